"""The Transformer of an architecture alone, tokens in and tokens out: its record follows from the whole's."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.architectures.architecture import Architecture, Field, Layout, first_attention, heads_of
from flax_vit.layers import COMPUTATION

BEGINNING = 'transformer.'  # of its names in the whole


@dataclass(frozen=True, eq=False)
class TransformerLayout(Layout):
    """The names in it that a range of releases gave."""

    whole: str = ''  # the name of the model that it is of

    def __str__(self) -> str:
        return f'Transformer of the {self.whole} of vit-pytorch {self.releases}'


class TransformerArchitecture(Architecture):
    """The Transformer of `whole`, whose Flax model makes its own by `transformer_alone`."""

    SIZES = frozenset({'1', 'dim', 'mlp_dim', 'heads', 'heads x dim_head'})

    def __init__(self, whole: Architecture) -> None:
        name = whole.model.__name__
        probe = {**whole.probe, 'depth': 1}
        alone = {layout: whole.model(**{**probe, **layout.fields}).transformer_alone() for layout in whole.layouts}
        self.model = whole.model.TRANSFORMER
        self.torch_classes = (f'{whole.torch_classes[0].rpartition(".")[0]}.Transformer',)
        self.torch_arguments = {'dim': 8, 'heads': 2, 'dim_head': 4, 'mlp_dim': 1}
        self.axes = tuple(axis for axis in whole.axes if axis.quantity in self.SIZES)
        self.probe = {field: whole.probe[field] for field in ('dim', 'mlp_dim', 'heads', 'dim_head')}
        self.assumed = whole.assumed & self.field_defaults().keys()
        layouts: dict[Any, Layout] = {}
        for layout, module in alone.items():
            fields = {
                field: value
                for field, default in self.field_defaults().items()
                if field not in self.assumed and (value := getattr(module, field)) != default
            }
            renames = {
                theirs.removeprefix(BEGINNING): ours.removeprefix(BEGINNING)
                for theirs, ours in layout.renames.items()
                if ours.startswith(BEGINNING)
            }
            same = (*fields.items(), *renames.items())
            layouts.setdefault(
                same, TransformerLayout(layout.id, self.model, layout.releases, fields, renames, whole=name)
            )
        self.layouts = tuple(layouts.values())

    def field_defaults(self) -> dict[str, Any]:
        """The fields that have a default and say what is computed."""
        return {
            field.name: field.default
            for field in dataclasses.fields(self.model)
            if field.default is not dataclasses.MISSING
            and field.name not in {'parent', 'name', 'param_dtype', *COMPUTATION}
        }

    def quantities(self, model: Any) -> dict[str, int]:
        return {
            '1': 1,
            'heads': model.heads,
            'dim': model.dim,
            'mlp_dim': model.mlp_dim,
            'heads x dim_head': model.heads * model.dim_head,
        }

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """As in vit-pytorch, dim_head has no default."""
        return {**fields, **heads_of(fields, sizes['heads x dim_head'], None)}

    def known_fields(self, module: Any) -> dict[str, Any]:
        rates = {part.p for part in module.modules() if type(part).__name__ == 'Dropout'}
        dropout = {'dropout': rates.pop()} if len(rates) == 1 and 'dropout' in self.field_defaults() else {}
        return {'heads': first_attention(module).heads} | dropout

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        import torch

        module = self.torch_class()(**arguments)
        if not model.final_norm:
            module.norm = torch.nn.Identity()
        return module

    def parts(self, model: Any) -> dict[str, str]:
        parts = {}
        for block in range(model.depth):
            parts[f'layers.{block}.0'] = f'block {block} attention'
            parts[f'layers.{block}.1'] = f'block {block} feed-forward'
        return parts | {'': 'tokens'}
