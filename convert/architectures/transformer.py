"""The Transformer of an architecture alone, tokens in and tokens out: its record follows from the whole's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.architectures.architecture import (
    Architecture,
    AttentionMap,
    Field,
    Layout,
    dropout_rate,
    first_attention,
    heads_of,
)
from flax_vit.architectures import defaults_of
from flax_vit.checks import COMPUTATION

BEGINNING = 'transformer.'  # of its names in the whole


class TransformerArchitecture(Architecture):
    """The Transformer of `whole`, whose Flax model makes its own by `transformer_alone`."""

    blocks = 'layers'
    SIZES = frozenset({'1', 'dim', 'mlp_dim', 'heads', 'dim_head', 'heads x dim_head'})

    def __init__(self, whole: Architecture) -> None:
        self.whole = whole
        self.model = whole.model.TRANSFORMER
        wholes = [layout.model(**whole.fields_of_probe(layout.fields, 1)) for layout in whole.layouts]
        self.torch_classes = tuple(dict.fromkeys(map(self.torch_name, wholes)))
        self.axes = tuple(axis for axis in whole.axes if axis.quantity in self.SIZES)
        self.probe = {name: whole.probe[name] for name in ('dim', 'mlp_dim', 'heads', 'dim_head')}
        self.assumed = whole.assumed & self.own_fields().keys()
        self.layouts = tuple(map(self.layout_alone, whole.layouts))

    def torch_name(self, model: Any) -> str:
        return f'{self.whole.torch_name(model).rpartition(".")[0]}.Transformer'

    def own_fields(self) -> dict[str, Any]:
        """The fields that have a default and say what is computed."""
        defaults = {name: each for name, each in defaults_of(self.model).items() if each is not dataclasses.MISSING}
        return {name: each for name, each in defaults.items() if name not in COMPUTATION | {'param_dtype'}}

    def layout_alone(self, layout: Layout) -> Layout:
        """What becomes of a layout of the whole."""
        whole = layout.model(**self.whole.fields_of_probe(layout.fields, 1))
        alone, of_whole = whole.transformer_alone(), defaults_of(layout.model)
        fields = {
            name: value
            for name, default in self.own_fields().items()
            if (value := getattr(alone, name)) != default and (name in layout.fields or name not in of_whole)
        }
        renames = {
            theirs.removeprefix(BEGINNING): ours.removeprefix(BEGINNING)
            for theirs, ours in layout.renames.items()
            if ours.startswith(BEGINNING)
        }
        of = f'the {self.whole.model.__name__} of '
        return Layout(layout.id, self.model, layout.releases, fields, renames, of=of)

    def today(self, model: Any) -> dict[str, Any]:
        follow = [name for name, default in self.own_fields().items() if default is None]  # from the other fields
        usual = model.clone(**dict.fromkeys(follow))
        return super().today(model) | {name: getattr(usual, name) for name in follow}

    def told_by_names(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        told = self.whole.told_by_names(layout, shapes)
        return {name: value for name, value in told.items() if name in {**self.probe, **self.own_fields()}}

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """As in vit-pytorch, dim_head has no default. Where there is no projection, one head has the full width."""
        return {**fields, **heads_of(fields, sizes.get('heads x dim_head', sizes['dim']), None)}

    def known_fields(self, module: Any) -> dict[str, Any]:
        dropout = {'dropout': dropout_rate(module)} if 'dropout' in self.own_fields() else {}
        return {'heads': first_attention(module).heads} | dropout

    def smallest(self, module: Any) -> dict[str, Any]:
        arguments = {'dim_head': 4, **self.whole.smallest(module)}
        return {name: value for name, value in arguments.items() if name in {**self.probe, **self.own_fields()}}

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        import torch

        module = self.torch_class(model)(**arguments)
        if not model.final_norm:
            module.norm = torch.nn.Identity()
        return self.whole.as_released(module, model)

    def maps_of_block(self, model: Any, block: int) -> tuple[AttentionMap, ...]:
        return self.whole.maps_of_block(model, block)

    def parts(self, model: Any) -> dict[str, str]:
        return self.block_parts(model) | {'': 'tokens'}
