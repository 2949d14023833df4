"""The paper's own Simple ViT: the names that big_vision gave, and what people get wrong. Imports flax_vit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from convert.architectures.architecture import (
    Architecture,
    Axis,
    ComputedTable,
    Field,
    Layout,
    patch_of_kernel,
    prepared,
)
from convert.architectures.simple_vit import SimpleViTArchitecture, SimpleViTWay, exact_table, table_limit
from convert.architectures.way import Mistake, Way
from flax_vit.official_simple_vit import EPSILON, OfficialSimpleViT

PUBLISHED = 224  # pixels


def _names(attention: str, norm: str, feed_forward: str) -> dict[str, str]:
    block = 'Transformer.encoderblock_#.'
    return {
        'embedding.': 'to_patch_embedding.1.',
        f'{block}LayerNorm_0.': 'transformer.layers.#.0.norm.',
        f'{block}MultiHeadDotProductAttention_{attention}.': 'transformer.layers.#.0.',
        f'{block}LayerNorm_{norm}.': 'transformer.layers.#.1.net.0.',
        f'{block}MlpBlock_{feed_forward}.Dense_0.': 'transformer.layers.#.1.net.1.',
        f'{block}MlpBlock_{feed_forward}.Dense_1.': 'transformer.layers.#.1.net.3.',
        'Transformer.encoder_norm.': 'transformer.norm.',
    }


def _layout(name: str, when: str, names: Mapping[str, str]) -> Layout:
    return Layout(name, OfficialSimpleViT, when, renames=names, source='big_vision', mark='encoderblock', flax=True)


@dataclass(frozen=True)
class OfficialSimpleViTWay(Way):
    """A way to compute it. Its tensors are as in vit-pytorch's SimpleViT: patches in a row, one to_qkv."""

    TO_OUT = 'out'
    SECOND_LINEAR = 'net.3'

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'OfficialSimpleViTWay':
        tensors = {**tensors, 'pos_embedding': np.asarray(model.pos_embedding(), np.float64)}
        return cls(model, tensors, model.heads, epsilon=EPSILON, activation='tanh', final_norm='transformer.norm')

    @classmethod
    def in_matrices(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = dict(tensors)
        if (patches := found.get('to_patch_embedding.1.weight')) is not None:
            found['to_patch_embedding.1.weight'] = rearrange(patches, 'dim c h w -> dim (h w c)')
        for name in tensors:
            if name.endswith('.0.query.weight'):
                part = name.removesuffix('query.weight')
                weights, biases = (
                    [found.pop(f'{part}{which}.{end}') for which in ('query', 'key', 'value')]
                    for end in ('weight', 'bias')
                )
                found[f'{part}to_qkv.weight'] = rearrange(weights, 'qkv d h dim -> (qkv h d) dim')
                found[f'{part}to_qkv.bias'] = rearrange(biases, 'qkv h d -> (qkv h d)')
                found[f'{part}out.weight'] = rearrange(found[f'{part}out.weight'], 'dim d h -> dim (h d)')
        return found

    position_mistakes = SimpleViTWay.position_mistakes

    def own_mistakes(self, part: str, tokens: int) -> Iterator[Mistake]:
        yield from super().own_mistakes(part, tokens)
        if part == '' and self.model.rep_size:
            yield Mistake('without the tanh after pre_logits', {'left_out': frozenset({'tanh'})})

    def logits(self, x: np.ndarray) -> np.ndarray:
        if self.model.rep_size:
            x = self.linear(x, 'pre_logits')
            x = x if 'tanh' in self.left_out else self.rounded(np.tanh(self.wide(x)))
        return super().logits(x)


class OfficialSimpleViTArchitecture(Architecture):
    """big_vision's ViT with posemb='sincos2d' and pool_type='gap'. As its truth is JAX, it is compared with numpy."""

    model = OfficialSimpleViT
    torch_classes = ('convert.references.simple_vit.SimpleViT',)
    layouts = (
        _layout('G1', 'since 23 June 2022', _names('0', '1', '0')),
        _layout('G0', 'before 23 June 2022, as the published weights', _names('1', '2', '3')),
    )
    axes = (
        *map(Axis, ('1', 'patch height', 'patch width', 'channels', 'heads', 'dim_head')),
        *map(Axis, ('dim', 'mlp_dim', 'num_classes', 'rep_size')),
    )
    probe: Mapping[str, Any] = {
        'image_size': (14, 33),
        'patch_size': (2, 3),
        'channels': 4,
        'heads': 5,
        'dim': 40,
        'mlp_dim': 29,
        'num_classes': 31,
        'rep_size': 37,
    }
    way = OfficialSimpleViTWay
    truth = 'big_vision'

    def told_by_names(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {} if 'pre_logits.kernel' in shapes else {'rep_size': 0}

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """The weights tell all but the image size, on which nothing hangs: positions are computed for any."""
        sides = sizes['patch height'], sizes['patch width']
        found = {**fields, **patch_of_kernel(fields, sides)}
        if 'image_size' not in fields:
            fits = all(PUBLISHED % side == 0 for side in sides)
            why = 'the model takes images of any size; the published ones were trained with this'
            found['image_size'] = Field(PUBLISHED, 'inferred', why) if fits else Field(None, 'unknown', 'give any')
        return found

    def preprocessing(self, layout: Layout, model: Any) -> dict[str, Any] | None:
        return prepared(model, 256, 'area') if model.image_size == PUBLISHED else None

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        return self.torch_class(model)(model)

    def table(self, model: Any) -> ComputedTable:
        """The largest difference of the port's sincos table from the exact one, and what it may be."""
        difference = np.abs(exact_table(model) - model.pos_embedding()).max()
        return ComputedTable(float(difference), table_limit(model), 'the exact one')

    table_and_mistakes = SimpleViTArchitecture.table_and_mistakes
