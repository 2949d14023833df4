"""vit-pytorch's DeepViT: the layouts of its names, and what people get wrong in it. Imports flax_vit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    AttentionMap,
    Axis,
    Field,
    Layout,
    image_of_patches,
    prenorm,
)
from convert.architectures.way import Mistake, Way
from convert.errors import ConversionError
from flax_vit.deep_vit import DeepViT


@dataclass(frozen=True)
class DeepViTWay(Way):
    """A way to compute a DeepViT."""

    TO_OUT = 'to_out.0'
    SECOND_LINEAR = 'net.4'  # a Dropout is in between

    reattention_axis: int = 0  # of heads, queries, keys: the one that is normalised

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'DeepViTWay':
        return cls(model, tensors, model.heads, pool=model.pool)

    def reattended(self, attn: np.ndarray, name: str) -> np.ndarray:
        if 're-attention' in self.left_out:
            return attn
        mix = self.tensors[f'{name}.reattn_weights']
        attn = np.moveaxis(self.product(np.moveaxis(attn, 0, -1), mix), -1, 0)
        last = np.moveaxis(attn, self.reattention_axis, -1)
        return np.moveaxis(self.norm(last, f'{name}.reattn_norm.1'), -1, self.reattention_axis)

    def own_mistakes(self, part: str, tokens: int) -> Iterator[Mistake]:
        mix = f'{part}.reattn_weights'
        if mix not in self.tensors:
            return
        identity = {mix: np.eye(self.heads)}
        yield Mistake('without re-attention', {'left_out': frozenset({'re-attention'})})
        yield Mistake('without the mixing of heads, but with its LayerNorm', tensors=identity)
        for axis, called in {1: 'queries', 2: 'keys'}.items() if tokens == self.heads else ():
            yield Mistake(f'with re-attention normalised over {called} instead of heads', {'reattention_axis': axis})


class DeepViTArchitecture(Architecture):
    """vit-pytorch's DeepViT: learned positions, a class token, re-attention."""

    model = DeepViT
    torch_classes = ('vit_pytorch.deepvit.DeepViT',)
    certain = ('pos_embedding', 'reattn_weights')
    layouts = (
        Layout('D2', DeepViT, '1.4.3 and later'),
        Layout('D1', DeepViT, '1.0.0 to 1.4.2', {}, prenorm('fn.')),
        Layout('D0', DeepViT, '0.9.0 to 0.40.2', {'patch_norm': False}, prenorm('fn.')),
    )
    axes = (*Architecture.axes, Axis('heads'), Axis('patches', offset=1))
    assumed = frozenset({'pool', 'dropout', 'emb_dropout'})
    way = DeepViTWay

    def image_size(self, fields: Mapping[str, Field], sizes: Mapping[str, int]) -> dict[str, Field]:
        """pos_embedding has a row for the class token and for each patch of a square."""
        patches = sizes['patches']
        if math.isqrt(patches) ** 2 != patches:
            raise ConversionError(
                f'pos_embedding has {patches} patches and a class token, but {patches} is not a square.'
            )
        return image_of_patches(fields, patches, 'assumed' if fields['patch_size'].how == 'assumed' else 'inferred')

    def maps_of_block(self, model: Any, block: int) -> tuple[AttentionMap, ...]:
        return (
            AttentionMap('dropout', 'attention_dropout', ', before re-attention'),
            AttentionMap('reattn_norm.1', 'reattn_norm.1', ', after re-attention', heads_last=True),
        )

    def alternatives(self, model: Any) -> Iterator[dict[str, Any]]:
        yield {'pool': 'mean' if model.pool == 'cls' else 'cls'}
