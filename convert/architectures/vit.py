"""vit-pytorch's ViT: the layouts of its names, and what people get wrong in it. Imports flax_vit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convert.architectures.architecture import (
    IDENTITY,
    Architecture,
    Axis,
    Field,
    Layout,
    class_name,
    first_attention,
    image_of_patches,
    other_heads,
    prenorm,
    unknown_heads,
)
from convert.architectures.way import ACTIVATIONS, Way
from flax_vit.vit import ViT

# What releases computed differently from today's.
_BEFORE_1_16 = {'class_token': True}
_BEFORE_1_4 = {**_BEFORE_1_16, 'norm_after_mean': True}
_BEFORE_1_0 = {**_BEFORE_1_4, 'patch_norm': False}
_BEFORE_0_7 = {**_BEFORE_1_0, 'project_out': True, 'scale_by_dim': False}
_BEFORE_0_6_7 = {**_BEFORE_0_7, 'scale_by_dim': True}
_BEFORE_0_3 = {**_BEFORE_0_6_7, 'hidden_head': True, 'pool': 'cls'}
# How they called the parameters.
_BATCHED = frozenset({'cls_token', 'pos_embedding'})
_BEFORE_0_10_NAMES = prenorm('fn.')
_BEFORE_0_7_NAMES = {**_BEFORE_0_10_NAMES, 'patch_to_embedding.': 'to_patch_embedding.1.'}
_BEFORE_0_2_2_NAMES = {  # their dropouts were elsewhere, or not yet
    **_BEFORE_0_7_NAMES,
    'transformer.layers.#.0.fn.fn.to_out.': 'transformer.layers.#.0.to_out.0.',
    'mlp_head.3.': 'mlp_head.4.',
}
_FIRST_NAMES = {
    **{old: new for old, new in _BEFORE_0_2_2_NAMES.items() if '.net.3.' not in old},
    'transformer.layers.#.1.fn.fn.net.2.': 'transformer.layers.#.1.net.4.',
}


@dataclass(frozen=True)
class ViTWay(Way):
    """A way to compute a ViT."""

    TO_OUT = 'to_out.0'
    SECOND_LINEAR = 'net.4'  # a Dropout is in between
    POOLS: ClassVar[Mapping[str, str]] = {**Way.POOLS, 'cls': 'the first token'}

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'ViTWay':
        final_norm = None if model.norm_after_mean else 'transformer.norm'
        scale = model.dim**-0.5 if model.scale_by_dim else None
        return cls(model, tensors, model.heads, pool=model.pool, final_norm=final_norm, scale=scale)

    def logits(self, x: np.ndarray) -> np.ndarray:
        if not self.model.hidden_head:
            return super().logits(x)
        *norm, hidden, last = (f'{self.model.HEAD}.{place}' for place in (0, 1, 4))
        x = ACTIVATIONS[self.activation](self.linear(self.norm(x, norm[0]), hidden))
        return self.linear(x, last)


class ViTArchitecture(Architecture):
    """vit-pytorch's ViT: learned positions and, before 1.16.0 or with pool 'cls', a class token."""

    model = ViT
    torch_classes = ('vit_pytorch.vit.ViT', 'vit_pytorch.distill.DistillableViT')
    certain = ('pos_embedding',)
    layouts = (
        Layout('V8', ViT, '1.16.1 and later'),
        Layout('V7', ViT, '1.16.0', {'class_token': False, 'pool': 'mean'}, {}, _BATCHED),
        Layout('V6', ViT, '1.4.0 to 1.16.0', _BEFORE_1_16, {}, _BATCHED),
        Layout('V5', ViT, '1.0.0 to 1.2.9', _BEFORE_1_4, prenorm(), _BATCHED),
        Layout('V4', ViT, '0.10.1 to 0.40.2', _BEFORE_1_0, prenorm(), _BATCHED),
        Layout('V3', ViT, '0.7.0 to 0.9.3', _BEFORE_1_0, _BEFORE_0_10_NAMES, _BATCHED),
        Layout('V2', ViT, '0.6.7 to 0.6.8', _BEFORE_0_7, _BEFORE_0_7_NAMES, _BATCHED),
        Layout('V1', ViT, '0.3.0 to 0.6.6', _BEFORE_0_6_7, _BEFORE_0_7_NAMES, _BATCHED),
        Layout('V0', ViT, '0.2.2 to 0.2.7', _BEFORE_0_3, _BEFORE_0_7_NAMES, _BATCHED),
        Layout('V0b', ViT, '0.2.1', _BEFORE_0_3, _BEFORE_0_2_2_NAMES, _BATCHED),
        Layout('V0a', ViT, '0.2.0', _BEFORE_0_3, _FIRST_NAMES, _BATCHED),
    )
    # The head's LayerNorm under today's name. Of the class token alone it computes the same there; read, it is V8.
    head_norm_as_final = Layout(
        'V8', ViT, '1.16.1 and later', _BEFORE_1_4, {'transformer.norm.': 'mlp_head.0.', 'mlp_head.': 'mlp_head.1.'}
    )
    axes = (
        *Architecture.axes,
        Axis('dim', factor=3),  # of one head of the full width, which has no projection after it
        Axis('patches'),
        Axis('patches', offset=1),
    )
    probe: Mapping[str, Any] = {**Architecture.probe, 'dim_head': 20}  # dim, as where there is no projection
    assumed = frozenset({'pool', 'dropout', 'emb_dropout'})
    way = ViTWay

    def layouts_of(self, model: Any) -> list[Layout]:
        newest = [self.head_norm_as_final] if model.num_classes and model.pool == 'cls' else []
        return [layout for layout in (*newest, *self.layouts) if self.computes(layout, model)]

    def today(self, model: Any) -> dict[str, Any]:
        """Today class token and projection follow from pool and width; where dim_head is dim, both scales are one."""
        usual = model.clone(class_token=None, project_out=None)
        told = {name: getattr(usual, name) for name in ('pool', 'class_token', 'project_out')}
        told |= {'scale_by_dim': model.scale_by_dim} if model.dim_head == model.dim else {}
        return super().today(model) | told

    def told_by_names(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        told: dict[str, Any] = {'project_out': any('.to_out.' in name for name in shapes)}
        if not told['project_out']:
            told['heads'] = 1
        if 'class_token' not in layout.fields:
            told['class_token'] = 0 not in shapes.get('cls_token', (0,))
            told['pool'] = 'cls' if told['class_token'] else 'mean'
        return told

    def empty(self, model: Any) -> dict[str, tuple[int, ...]]:
        return {} if model.class_token else {'cls_token': (0, model.dim)}

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """Without a projection, one head has the full width; in the releases of hidden heads, dim_head no default.

        With a projection one head of the full width is not assumed: since 0.7.4 it has none.
        """
        hidden = 'hidden_head' in fields and fields['hidden_head'].value
        found = super().told_by_sizes(
            fields,
            {'heads x dim_head': sizes['dim'], **sizes},
            {**defaults, 'dim_head': None} if hidden else defaults,
        )
        one_head = (found['heads'].how, found['heads'].value) == ('assumed', 1)
        if one_head and sizes.get('heads x dim_head') == sizes['dim']:
            default = f"vit-pytorch's default dim_head {sizes['dim']}"
            fails = f'{default} would be one head, which has had no to_out since vit-pytorch 0.7.4'
            return found | unknown_heads(sizes['dim'], fails, fewest=2)
        return found

    def image_size(self, fields: Mapping[str, Field], sizes: Mapping[str, int]) -> dict[str, Field]:
        # Oblong images of as many patches are computed the same. Only what a file may say of them is still asked.
        live = 'emb_dropout' in fields and fields['emb_dropout'].how == 'inferred'
        return image_of_patches(fields, sizes['patches'], 'inferred' if live else 'assumed')

    def smallest(self, module: Any) -> dict[str, Any]:
        arguments = super().smallest(module)
        if class_name(first_attention(module).to_out) == IDENTITY:  # one head of the full width
            arguments |= {'heads': 1, 'dim_head': arguments['dim']}
        return arguments

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        from torch import nn

        module = super().torch_module(model, {**arguments, 'pool': 'cls' if model.class_token else 'mean'})
        module.pool = model.pool
        if not model.class_token:  # nothing is in it, and its gradient is nothing
            empty = module.cls_token
            del module.cls_token
            module.register_buffer('cls_token', empty.detach(), persistent=False)
        self.as_released(module.transformer, model)
        if model.num_classes and model.hidden_head:
            norm, _ = module.mlp_head
            hidden = nn.Linear(model.dim, model.mlp_dim)
            head = nn.Linear(model.mlp_dim, model.num_classes)
            module.mlp_head = nn.Sequential(norm, hidden, nn.GELU(), nn.Dropout(model.dropout), head)
        return module

    def as_released(self, transformer: Any, model: Any) -> Any:
        from torch import nn

        for attention, _ in transformer.layers:
            if model.scale_by_dim:
                attention.scale = model.dim**-0.5
            if model.project_out and isinstance(attention.to_out, nn.Identity):
                attention.to_out = nn.Sequential(nn.Linear(model.dim, model.dim), nn.Dropout(model.dropout))
        return transformer

    def alternatives(self, model: Any) -> Iterator[dict[str, Any]]:
        if model.class_token:
            yield {'pool': 'mean' if model.pool == 'cls' else 'cls'}
        yield {'scale_by_dim': not model.scale_by_dim}
        yield from other_heads(model)
