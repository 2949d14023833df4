"""The paper's own DeepViT: the names that dvit_repo gave, and what people get wrong in it. Imports flax_vit."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from convert.architectures.architecture import (
    Architecture,
    AttentionMap,
    Axis,
    Field,
    Layout,
    image_of_patches,
    patch_of_kernel,
    prepared,
)
from convert.architectures.way import Mistake, Way
from flax_vit.checks import pair
from flax_vit.official_deep_vit import BATCH_NORM_EPSILON, STEM, VARIANTS, OfficialDeepViT

_BLOCKS = {
    'blocks.#.norm1.': 'transformer.layers.#.0.norm.',
    'blocks.#.attn.': 'transformer.layers.#.0.',
    'blocks.#.attn.qkv.': 'transformer.layers.#.0.to_qkv.',
    'blocks.#.attn.proj.': 'transformer.layers.#.0.to_out.',
    'blocks.#.norm2.': 'transformer.layers.#.1.net.0.',
    'blocks.#.mlp.fc1.': 'transformer.layers.#.1.net.1.',
    'blocks.#.mlp.fc2.': 'transformer.layers.#.1.net.4.',
    'pos_embed': 'pos_embedding',
    'norm.': 'transformer.norm.',
}
_PLAIN = {**_BLOCKS, 'patch_embed.proj.': 'to_patch_embedding.1.'}
_CNN = {
    **_BLOCKS,
    'patch_embed.conv1.': 'to_patch_embedding.1.',
    'patch_embed.bn1.': 'to_patch_embedding.2.',
    'patch_embed.conv2.': 'to_patch_embedding.4.',
    'patch_embed.bn2.': 'to_patch_embedding.5.',
    'patch_embed.proj.': 'to_patch_embedding.8.',
}


def _layout(name: str, what: str, fields: Mapping[str, Any], names: Mapping[str, str]) -> Layout:
    return Layout(name, OfficialDeepViT, what, fields, names, source='dvit_repo', mark='reatten_matrix')


_REATTENTION = re.compile(r'\.attn\.(reatten_matrix|var_norm)\.')
# What the weights don't tell, and the registered models differ in.
UNTOLD = ('transform_scale', 'scale_adjustment')


@dataclass(frozen=True)
class OfficialDeepViTWay(Way):
    """A way to compute it."""

    TO_OUT = 'to_out'
    SECOND_LINEAR = 'net.4'

    padding: str = 'on every side'
    statistics_of: str = 'running'  # of BatchNorm
    adjustment: float = 1.0
    after: float = 1.0  # of the re-attended maps

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'OfficialDeepViTWay':
        scale = (model.dim // model.heads) ** -0.5 if model.qk_scale is None else model.qk_scale
        return cls(
            model,
            tensors,
            model.heads,
            epsilon=model.layer_norm_epsilon,
            scale=scale,
            final_norm='transformer.norm',
            pool='cls',
            adjustment=model.scale_adjustment,
            after=scale if model.transform_scale else 1.0,
        )

    @classmethod
    def in_matrices(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith('reatten_matrix.weight'):
                found[name] = tensor[:, :, 0, 0]
            elif name in {'to_patch_embedding.8.weight', 'to_patch_embedding.1.weight'}:
                cnn = 'to_patch_embedding.8.weight' in tensors
                is_stem = cnn and name == 'to_patch_embedding.1.weight'
                found[name] = tensor if is_stem else rearrange(tensor, 'dim c h w -> dim (h w c)')
        return found

    def own_mistakes(self, part: str, tokens: int) -> Iterator[Mistake]:
        of_the_batch = 'with the statistics of the batch in BatchNorm (train=True?)', {'statistics_of': 'batch'}
        mix = f'{part}.reatten_matrix'
        if part == 'to_patch_embedding.8':
            yield Mistake("padded as 'SAME' instead of by 3 on every side", {'padding': 'SAME'})
            yield Mistake(*of_the_batch)
        elif f'{mix}.weight' in self.tensors:
            identity = {f'{mix}.weight': np.eye(self.heads), f'{mix}.bias': np.zeros(self.heads)}
            yield Mistake('without re-attention', {'left_out': frozenset({'re-attention'})})
            yield Mistake('without the mixing of heads, but with its BatchNorm', tensors=identity)
            yield Mistake(*of_the_batch)
            for after, words in {1.0: 'without a scale', self.scale or 1.0: 'with the scale of queries x keys'}.items():
                if after != self.after:
                    yield Mistake(f'{words} after re-attention (transform_scale)', {'after': after})
        else:
            yield from super().own_mistakes(part, tokens)
        for adjustment in {1.0, 0.5} - {self.adjustment} if part.startswith('transformer.layers') else ():
            yield Mistake(f'with scale_adjustment={adjustment}', {'adjustment': adjustment})

    def patch_embedding(self, image: np.ndarray) -> np.ndarray:
        if not self.model.cnn_stem:
            return super().patch_embedding(image)
        x, others = image, self.batch if self.statistics_of == 'batch' else ()
        for conv, norm, stride in ((1, 2, 2), (4, 5, 1)):
            x, *others = (
                self.convolution(each, self.tensors[f'to_patch_embedding.{conv}.weight'], stride)
                for each in (x, *others)
            )
            normalised = self.batch_norm(f'to_patch_embedding.{norm}', others)
            x, *others = (np.maximum(normalised(each), 0) for each in (x, *others))
        rows, columns = pair(self.model.patch_size)
        patches = rearrange(x, self.cut, p1=rows // 2, p2=columns // 2)
        return self.linear(patches, 'to_patch_embedding.8')

    def convolution(self, x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
        """(height, width, channels) -> (rows, columns, features)."""
        size = weight.shape[2]
        before = after = size // 2
        if self.padding == 'SAME':
            before, after = (size - stride) // 2, size - stride - (size - stride) // 2
        padded = np.pad(x, ((before, after), (before, after), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))[::stride, ::stride]
        return self.product(rearrange(windows, 'h w c i j -> h w (c i j)'), weight.reshape(len(weight), -1).T)

    def batch_norm(self, name: str, batch: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Of the features in the last axis, with the running statistics, or with those of a `batch`."""
        mean, variance = self.tensors[f'{name}.running_mean'], self.tensors[f'{name}.running_var']
        if batch:
            features = np.concatenate([each.reshape(-1, each.shape[-1]) for each in batch])
            mean, variance = features.mean(axis=0), features.var(axis=0)
        factor = self.tensors[f'{name}.weight'] / np.sqrt(variance + BATCH_NORM_EPSILON)
        return lambda x: (x - mean) * factor + self.tensors[f'{name}.bias']

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        return super().attention(self.adjustment * x, name) / self.adjustment

    def feed_forward(self, x: np.ndarray, name: str) -> np.ndarray:
        return super().feed_forward(self.adjustment * x, name) / self.adjustment

    def reattended(self, attn: np.ndarray, name: str) -> np.ndarray:
        if 're-attention' in self.left_out or f'{name}.reatten_matrix.weight' not in self.tensors:
            return attn

        def mixed(attn: np.ndarray) -> np.ndarray:
            return self.linear(np.moveaxis(attn, 0, -1), f'{name}.reatten_matrix')

        batch = [
            mixed(self.attention_map(*self.queries_keys_values(self.adjustment * x, name)[:2]))
            for x in (self.batch if self.statistics_of == 'batch' else ())
        ]
        return np.moveaxis(self.batch_norm(f'{name}.var_norm', batch)(mixed(attn)), -1, 0) * self.after


class OfficialDeepViTArchitecture(Architecture):
    """dvit_repo's DeepViT, as PyTorch computes it; its module is this project's own, as no package has it."""

    model = OfficialDeepViT
    torch_classes = ('convert.references.deep_vit.DeepViT',)
    layouts = (
        _layout('P', 'with one convolution for patches', {'cnn_stem': False}, _PLAIN),
        _layout('C', 'with a stem of convolutions', {'cnn_stem': True}, _CNN),
    )
    axes = (
        Axis('1'),
        Axis('1', STEM),
        Axis('1', 7),
        Axis('1', 3),
        *map(Axis, ('channels', 'patch height', 'patch width', 'half of it', 'half its width', 'heads', 'mlp_dim')),
        Axis('dim'),
        Axis('dim', factor=3),
        Axis('num_classes'),
        Axis('patches', offset=1),
    )
    probe: Mapping[str, Any] = {
        'image_size': (44, 104),
        'patch_size': (22, 26),
        'channels': 5,
        'heads': 6,
        'dim': 60,
        'mlp_dim': 29,
        'num_classes': 31,
    }
    assumed = frozenset({'qk_scale', 'layer_norm_epsilon'})
    way = OfficialDeepViTWay

    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        told = (*UNTOLD, *self.assumed, 'cnn_stem', 'reattention')  # also where they have their default
        models = {name: OfficialDeepViT(num_classes=1, **fields) for name, fields in VARIANTS.items()}
        return {
            name: {**VARIANTS[name], **{field: getattr(model, field) for field in told}}
            for name, model in models.items()
        }

    def told_by_names(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        blocks = (re.fullmatch(r'blocks\.(\d+)\.attn\.reatten_matrix\.weight', name) for name in shapes)
        return {
            'reattention': tuple(sorted(int(block[1]) for block in blocks if block and len(block[1]) < 5)),
            'qkv_bias': any(name.endswith('.attn.qkv.bias') for name in shapes),
        }

    def fields_of_probe(self, told: Mapping[str, Any], depth: int) -> dict[str, Any]:
        fields = super().fields_of_probe(told, depth)
        return fields | ({'reattention': (0,)} if depth == 1 else {})

    def is_in_block(self, name: str, block: int, told: Mapping[str, Any]) -> bool:
        """Where no block re-attends, all are expected to: timm's ViT has the other names, and relatives of it have."""
        return not _REATTENTION.search(name) or not told['reattention'] or block in told['reattention']

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """What no weights tell, the registered model tells that has these sizes."""
        if fields['cnn_stem'].value:
            sides = 2 * sizes['half of it'], 2 * sizes['half its width']
        else:
            sides = sizes['patch height'], sizes['patch width']
        found = {**fields, **patch_of_kernel(fields, sides)}
        known = {name: field.value for name, field in found.items()}
        alike = {
            name: variant
            for name, variant in self.variants().items()
            if all(variant[part] == known[part] for part in ('dim', 'depth', 'mlp_dim', 'cnn_stem', 'reattention'))
        }
        for name in (*UNTOLD, *self.assumed):
            if name not in found and alike:
                value = next(iter(alike.values()))[name]
                found[name] = Field(value, 'inferred', f'that of {" and ".join(alike)}, which has these blocks')
        for name, why in {
            'transform_scale': 'whether maps are scaled after re-attention: False in all of dvit_repo but deepvit_S',
            'scale_adjustment': '1.0 with one convolution for patches, 0.5 with a stem, in all of dvit_repo',
        }.items():
            if name not in found:
                found[name] = Field(None, 'unknown', why)
        return found | image_of_patches(found, sizes['patches'], 'inferred' if alike else 'assumed')

    def preprocessing(self, layout: Layout, model: Any) -> dict[str, Any] | None:
        sizes = {224: 248, 384: 384}  # 224 / 0.9, and whole pictures
        return prepared(model, sizes[model.image_size], 'bicubic') if model.image_size in sizes else None

    def maps_of_block(self, model: Any, block: int) -> tuple[AttentionMap, ...]:
        softmax = AttentionMap('attention_drop', 'attention_drop', ', before re-attention')
        after = AttentionMap('var_norm', 'var_norm', ', after re-attention')
        return (softmax, after) if block in model.reattention else (AttentionMap('attention_drop', 'attention_drop'),)

    def parts(self, model: Any) -> dict[str, str]:
        first, *others = super().parts(model).items()
        return {f'to_patch_embedding.{8 if model.cnn_stem else 1}': first[1], **dict(others)}

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        return self.torch_class(model)(model)
