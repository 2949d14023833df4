"""vit-pytorch's SimpleViT: the layouts of its names, its sincos table, and what people get wrong. Imports flax_vit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    Axis,
    ComputedTable,
    Field,
    Layout,
    one_or_pair,
    other_heads,
    prepared,
)
from convert.architectures.way import Mistake, Way
from convert.errors import ConversionError
from flax_vit.checks import pair
from flax_vit.simple_vit import SimpleViT, posemb_sincos_2d

_B_COS = {
    'to_patch_embedding.linear.': 'to_patch_embedding.1.',
    'transformer.encoder_#.attn.': 'transformer.layers.#.0.',
    'transformer.encoder_#.ff.net.norm.': 'transformer.layers.#.1.net.0.',
    'transformer.encoder_#.ff.net.linear1.': 'transformer.layers.#.1.net.1.',
    'transformer.encoder_#.ff.net.linear2.': 'transformer.layers.#.1.net.3.',
    'linear_head.norm.': 'linear_head.0.',
    'linear_head.linear.': 'linear_head.1.',
}
_REGISTERS = {'num_register_tokens': 4}  # or another number: that of the probe, and vit-pytorch's default
_QK_NORM = {'qk_norm': True}
_BEFORE_1_4 = {'norm_after_mean': True}
_BEFORE_1_0 = {'patch_norm': False, **_BEFORE_1_4}


@dataclass(frozen=True)
class SimpleViTWay(Way):
    """A way to compute a SimpleViT."""

    TO_OUT = 'to_out'
    SECOND_LINEAR = 'net.3'
    POOLS: ClassVar[Mapping[str, str]] = {**Way.POOLS, 'cls': 'the first token'}
    RIGHT: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'SimpleViTWay':
        table = np.asarray(model.pos_embedding(), np.float64)
        final_norm = None if model.norm_after_mean else 'transformer.norm'
        kind = RegistersWay if model.num_register_tokens else QKNormWay if model.qk_norm else cls
        return kind(model, {**tensors, 'pos_embedding': table}, model.heads, final_norm=final_norm, **kind.RIGHT)

    def position_mistakes(self) -> dict[str, np.ndarray]:
        return table_mistakes(self.model, self.tensors['pos_embedding'])


@dataclass(frozen=True)
class RegistersWay(SimpleViTWay):
    """With register tokens."""

    POOLS: ClassVar[Mapping[str, str]] = {**SimpleViTWay.POOLS, 'patches': 'the mean of the patches'}
    RIGHT: ClassVar[Mapping[str, Any]] = {'pool': 'patches'}

    registers: str = 'last'  # of the tokens

    def embedded(self, x: np.ndarray) -> np.ndarray:
        tokens = [super().embedded(x), self.tensors['register_tokens']]
        return np.concatenate(tokens if self.registers == 'last' else tokens[::-1])

    def pools(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().pools(x), 'patches': x[: len(self.tensors['pos_embedding'])]}

    def own_mistakes(self, part: str, tokens: int) -> Iterator[Mistake]:
        yield from super().own_mistakes(part, tokens)
        if part == 'transformer.layers.0.0':
            yield Mistake('with the register tokens first instead of last', {'registers': 'first'})


@dataclass(frozen=True)
class QKNormWay(SimpleViTWay):
    """With normalised queries and keys."""

    RIGHT: ClassVar[Mapping[str, Any]] = {'scale': 1.0}

    qk_epsilon: float = 0.0  # beside the mean of the squares

    def normalised(self, x: np.ndarray, name: str) -> np.ndarray:
        if 'qk_norm' in self.left_out:
            return x
        squares = (x**2).mean if 'factor' not in self.left_out else (x**2).sum
        return x / np.sqrt(squares(axis=-1, keepdims=True) + self.qk_epsilon) * self.tensors[f'{name}.gamma']

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.norm(x, self.model.HEAD) if self.model.num_classes else x

    def own_mistakes(self, part: str, tokens: int) -> Iterator[Mistake]:
        """How many heads there are, the gammas tell."""
        if part.endswith('.0'):
            called, dim_head = 'queries and keys', self.model.dim_head
            yield Mistake(f'without the normalisation of {called}', {'left_out': frozenset({'qk_norm'})})
            yield Mistake(
                f"without gamma's factor {dim_head}**0.5 (dim_head) in {called}", {'left_out': frozenset({'factor'})}
            )
            yield Mistake(
                f'with the scale {dim_head}**-0.5 (dim_head), although {called} are normalised',
                {'scale': dim_head**-0.5},
            )
            yield Mistake(
                f"with an epsilon of 1e-06 (flax's default) in the normalisation of {called}", {'qk_epsilon': 1e-6}
            )


class SimpleViTArchitecture(Architecture):
    """vit-pytorch's SimpleViT: its position table is computed, and in no checkpoint."""

    model = SimpleViT
    torch_classes = (
        'vit_pytorch.simple_vit.SimpleViT',
        'vit_pytorch.simple_vit_with_register_tokens.SimpleViT',
        'vit_pytorch.simple_vit_with_qk_norm.SimpleViT',
        'vit_pytorch.simple_vit_with_patch_dropout.SimpleViT',
        'vit_pytorch.simple_flash_attn_vit.SimpleViT',
    )
    layouts = (
        Layout('S3', SimpleViT, '1.4.1 and later'),
        Layout('S3R', SimpleViT, '1.5.0 and later, with register tokens', _REGISTERS, mark='register_tokens'),
        Layout('S3Q', SimpleViT, '1.4.2 and later, with query-key normalisation', _QK_NORM, mark='q_norm.gamma'),
        Layout('S1', SimpleViT, '1.0.0 to 1.2.9', _BEFORE_1_4),
        Layout('S0', SimpleViT, '0.35.0 to 0.40.2', _BEFORE_1_0),
        Layout('B-cos', SimpleViT, '0.35.0 to 0.40.2, under the names of B-cos/B-cos-v2', _BEFORE_1_0, _B_COS),
    )
    axes = (*Architecture.axes, Axis('heads'), Axis('dim_head'), Axis('num_register_tokens'))
    tables = frozenset({'pos_embedding'})  # where somebody made it a buffer
    way = SimpleViTWay

    def preprocessing(self, layout: Layout, model: Any) -> dict[str, Any] | None:
        """B-cos v2 trained on ImageNet."""
        if layout.id != 'B-cos' or model.image_size != 224:
            return None
        return prepared(model, 256, 'bilinear', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def computes(self, layout: Layout, model: Any) -> bool:
        return super().computes(layout, model.clone(**_REGISTERS) if model.num_register_tokens else model)

    def fields_of_probe(self, told: Mapping[str, Any], depth: int) -> dict[str, Any]:
        fields = super().fields_of_probe(told, depth)
        return fields | ({'num_classes': fields['dim']} if fields.get('qk_norm') else {})

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """A head of its own says how many classes there are; the LayerNorm of `qk_norm` has no other size than dim."""
        found = super().told_by_sizes(fields, sizes, defaults)
        return {'num_classes': Field(sizes['dim'], 'inferred', 'the head, which is a LayerNorm'), **found}

    def known_fields(self, module: Any) -> dict[str, Any]:
        fields = super().known_fields(module)
        if hasattr(module, 'pos_embedding'):  # since vit-pytorch 1.2.5
            grid = sincos_grid(module.pos_embedding.detach().cpu().numpy())
            patch = module.to_patch_embedding[0].axes_lengths
            fields['image_size'] = one_or_pair((grid[0] * patch['p1'], grid[1] * patch['p2']))
        return fields

    def told_by_tables(self, tables: Mapping[str, np.ndarray]) -> dict[str, int]:
        grids = [sincos_grid(table) for table in tables.values()]
        return {'rows': grids[0][0], 'columns': grids[0][1]} if grids else {}

    def image_size(self, fields: Mapping[str, Field], sizes: Mapping[str, int]) -> dict[str, Field]:
        """The table, where it is there, has a row for each patch."""
        image_size, patch_size = fields.get('image_size'), fields['patch_size']
        if 'rows' not in sizes or patch_size.value is None:
            return super().image_size(fields, sizes)
        height, width = pair(patch_size.value)
        told = one_or_pair((sizes['rows'] * height, sizes['columns'] * width))
        why = f'pos_embedding is the table of {sizes["rows"]} x {sizes["columns"]} patches of {patch_size.value}'
        if image_size and image_size.value != told:
            raise ConversionError(
                f'image_size={image_size.value!r} contradicts the weights: {why}, which is {told!r}. Without that '
                'table, any image_size is taken.'
            )
        how: Any = 'assumed' if patch_size.how == 'assumed' else 'inferred'
        return {} if image_size else {'image_size': Field(told, how, why)}

    def torch_name(self, model: Any) -> str:
        kind = 'qk_norm' if model.qk_norm else 'register_tokens' if getattr(model, 'num_register_tokens', 0) else ''
        return f'vit_pytorch.simple_vit_with_{kind}.SimpleViT' if kind else super().torch_name(model)

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        """With the port's position table, compared apart: PyTorch's depends on the processor in the last bits."""
        import torch

        registers = {'num_register_tokens': model.num_register_tokens} if model.num_register_tokens else {}
        module = super().torch_module(model, {**arguments, **registers})
        module.pos_embedding = torch.from_numpy(model.pos_embedding())
        return module

    def table(self, model: Any) -> ComputedTable:
        """The largest difference between the port's sincos table and PyTorch's on this machine, and what it may be."""
        from vit_pytorch.simple_vit import posemb_sincos_2d as theirs

        difference = np.abs(theirs(*model.grid, model.dim).numpy() - model.pos_embedding()).max()
        return ComputedTable(float(difference), table_limit(model), "PyTorch's own on this machine")

    def table_and_mistakes(self, model: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        exact = exact_table(model)
        return model.pos_embedding(), exact, table_mistakes(model, exact)

    def alternatives(self, model: Any) -> Iterator[dict[str, Any]]:
        yield from () if model.qk_norm else other_heads(model)


def sincos_grid(table: np.ndarray) -> tuple[int, int]:
    """The height and width in patches of the grid whose sincos table (height x width, dim) this is."""
    tokens, dim = table.shape[-2:]
    if table.size == tokens * dim > 0 and dim >= 8 and dim % 4 == 0:
        table = table.reshape(tokens, dim).astype(np.float32)
        # the first row of patches is at y = 0, where each sine of y is 0
        below = np.flatnonzero(np.abs(table[:, dim // 2]) > 0.1)
        width = int(below[0]) if below.size else tokens
        height = tokens // max(width, 1)
        if height * width == tokens and np.abs(posemb_sincos_2d(height, width, dim) - table).max() < 5e-3:
            return height, width
    raise ConversionError('pos_embedding is not the sincos table of SimpleViT: another function.')


def table_limit(model: Any) -> float:
    """How far two sincos tables may be apart that take the same steps in float32.

    A power may be one unit in the last place (2⁻²³) off, its product half a unit more; an angle, at most the position,
    carries both into the sine, which adds a unit of its own.
    """
    return (2 * max(model.grid) + 1) * 2.0**-23


def exact_table(model: Any, steps: int | None = None) -> np.ndarray:
    """The model's sincos table (tokens, dim) in float64; `steps` of the frequencies where they are others."""
    (height, width), quarter = model.grid, model.dim // 4
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:height, :width])
    omega = 10_000.0 ** -(np.arange(quarter) / (steps or quarter - 1))
    return np.concatenate([function(angle * omega) for angle in (x, y) for function in (np.sin, np.cos)], axis=1)


def table_mistakes(model: Any, right: np.ndarray) -> dict[str, np.ndarray]:
    """Sincos tables that are wrong, by the words for it."""
    exact = exact_table(model)
    halves = right.reshape(len(right), 2, -1)  # of x, of y
    quarters = right.reshape(len(right), 2, 2, -1)  # and of these, sines, cosines
    wrong = {
        'without positions': np.zeros_like(right),
        'with the axes of the sincos table swapped (y before x)': halves[:, ::-1],
        'with cosines before sines': quarters[:, :, ::-1],
        'with sines and cosines in turn': quarters.swapaxes(2, 3),
        'with the sincos table column by column': right.reshape(*model.grid, -1).swapaxes(0, 1),
        'with frequencies of steps 4 / dim instead of 1 / (dim / 4 - 1)': exact_table(model, steps=model.dim // 4),
        'with the sincos table computed in float64': exact,
        'with the sincos table computed in float64, then rounded': exact.astype(np.float32).astype(np.float64),
    }
    return {words: table.reshape(right.shape) for words, table in wrong.items()}
