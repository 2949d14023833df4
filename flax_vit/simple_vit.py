"""SimpleViT (Beyer, Zhai, Kolesnikov 2022, arXiv:2205.01580) as vit-pytorch computes it: `vit_pytorch/simple_vit.py`.

Its `simple_vit_with_register_tokens.py` and `simple_vit_with_qk_norm.py` are a field each. Submodules have the PyTorch
names in the PyTorch order, so that PyTorch's `transformer.layers.3.1.net.1.weight` is
`transformer/layers_3_1/net_1/kernel` here.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Float32

from flax_vit import layers
from flax_vit.checks import check_fields, pair
from flax_vit.layers import (
    FeedForward,
    Identity,
    Images,
    Keys,
    Layer,
    Model,
    Outputs,
    Queries,
    Tokens,
    aligned,
    at_least_float32,
    in_query_chunks,
    of_each_image,
    patch_embedding,
    sequential,
    weigh_or_fuse,
)
from flax_vit.mesh import COLUMNS, SHARED, Rules


def posemb_sincos_2d(
    height: int, width: int, dim: int, temperature: float = 10_000
) -> Float32[np.ndarray, '{height}*{width} {dim}']:
    """The fixed position table, row by row of the grid: sin x, cos x, sin y, cos y, a quarter of `dim` each.

    PyTorch takes every step in float32, whatever the model's dtype. So does this, each result rounded correctly
    (PyTorch's own power and sine may be one unit in the last place away from that, depending on the processor).
    """

    def rounded(function: np.ufunc, *arguments: Any) -> Float32[np.ndarray, '...']:
        return function(*arguments, dtype=np.float64).astype(np.float32)

    y, x = (axis.reshape(-1, 1).astype(np.float32) for axis in np.mgrid[:height, :width])
    exponent = np.arange(dim // 4, dtype=np.float32) / np.float32(dim // 4 - 1)
    omega = np.float32(1) / rounded(np.power, np.float32(temperature), exponent)
    angles = [x * omega, y * omega]
    table = [rounded(function, angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(table, axis=1)


class RMSNorm(Layer):
    """The one of `simple_vit_with_qk_norm.py`: vectors of length `dim_head**0.5`, times a `gamma` for each head.

    PyTorch's `F.normalize` divides by a length of at least 1e-12, which here is a square of at least 1e-24: so that a
    vector of zeros has a gradient, as it has in PyTorch.
    """

    heads: int
    dim_head: int

    @nn.compact
    def __call__(self, x: Float[Array, 'batch heads tokens d']) -> Float[Array, 'batch heads tokens d']:
        init = nn.initializers.constant(self.dim_head**-0.5)
        gamma = self.param('gamma', init, (self.heads, 1, self.dim_head), self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, gamma, dtype=self.dtype)
        x, gamma = (aligned(array, x.ndim).astype(at_least_float32(dtype)) for array in (x, gamma))
        square = jnp.maximum((x**2).sum(axis=-1, keepdims=True), 1e-24)
        return (x * jax.lax.rsqrt(square) * self.dim_head**0.5 * gamma).astype(dtype)


class Attention(Layer):
    dim: int
    heads: int
    dim_head: int
    qk_norm: bool
    attention: str
    query_chunk_size: int | None

    def setup(self) -> None:
        inner_dim = self.heads * self.dim_head
        self.norm = self.layer_norm()
        self.attend = Identity()  # names the attention map
        if self.qk_norm:
            self.q_norm, self.k_norm = self.inner(RMSNorm), self.inner(RMSNorm)
        self.to_qkv = self.linear(self.dim, 3 * inner_dim, bias=False)
        self.to_out = self.linear(inner_dim, self.dim, bias=False)

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        qkv = self.to_qkv(self.norm(x))
        q, k, v = jnp.unstack(rearrange(qkv, 'b n (qkv h d) -> qkv b h n d', qkv=3, h=self.heads))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)

        out = in_query_chunks(self, Attention.weigh, q, k, v, self.query_chunk_size)
        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))

    @nn.nowrap
    def weigh(self, q: Queries, k: Keys, v: Keys) -> Queries:
        scale = 1.0 if self.qk_norm else self.dim_head**-0.5
        return weigh_or_fuse(self, q, k, v, attend=self.attend, scale=scale, drops_out=False)


class Transformer(layers.Transformer):
    """SimpleViT's, of tokens (batch, tokens, dim); it has no dropout."""

    qk_norm: bool = False
    attention: str = 'plain'

    @nn.nowrap
    def block(self) -> list[nn.Module]:
        return [self.inner(Attention), self.inner(FeedForward, hidden_dim=self.mlp_dim)]


class SimpleViT(Model):
    """A vision transformer with a fixed sincos position table, mean pooling and a linear head; it has no dropout.

    With `num_register_tokens` it is that of vit-pytorch's simple_vit_with_register_tokens, with `qk_norm` that of its
    simple_vit_with_qk_norm, whose head is a LayerNorm.

    The arguments are vit-pytorch's, with its defaults; `dtype`, `param_dtype` and `precision` are linen's.

    Raises:
        ValueError: When the fields make no model.
    """

    HEAD: ClassVar[str] = 'linear_head'
    TRANSFORMER: ClassVar[type[nn.Module]] = Transformer
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('heads', 'dim_head')  # fields that make other functions of them
    SPLIT: ClassVar[Rules] = ((r'linear_head(_1)?/kernel$', COLUMNS), *SHARED)  # of its parameters over a mesh

    image_size: int | tuple[int, int]  # pixels; (height, width) when not square
    patch_size: int | tuple[int, int]  # pixels, likewise; it divides image_size
    num_classes: int  # 0: no head, the result is the pooled features (batch, dim)
    dim: int  # width of a token; a multiple of 4
    depth: int  # how many blocks, each of an attention and a feed-forward
    heads: int  # how many each attention has
    mlp_dim: int  # width of the hidden layer of a feed-forward
    channels: int = 3  # how many an image has
    dim_head: int = 64  # width of a query, key or value
    num_register_tokens: int = 0  # learned, without positions, behind the patches in every block, and not pooled
    qk_norm: bool = False  # queries and keys normalised, not scaled; a LayerNorm for a head, of num_classes = dim
    patch_norm: bool = True  # LayerNorms round the patch projection; vit-pytorch before 1.0.0 had none
    norm_after_mean: bool = False  # vit-pytorch before 1.4.0: mean over tokens first, then a LayerNorm in the head
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    attention: str = 'plain'  # 'fused': by cuDNN on NVIDIA GPUs in half precision, which holds no map; else plain
    query_chunk_size: int | None = None  # queries whose attention map is held at once; None: all. The same numbers
    remat: bool = False  # the backward pass computes each layer's inside anew, instead of keeping it
    scan_layers: bool = False  # one compiled block for any depth; parameters stacked, see `stack_layers`

    def __post_init__(self) -> None:
        check_fields(self, dim=8, num_register_tokens=0)
        if self.dim % 4:
            raise ValueError(f'SimpleViT: dim must be a multiple of 4 for the sincos table, not {self.dim}.')
        if self.qk_norm and self.num_classes not in (0, self.dim):
            raise ValueError(
                'SimpleViT: with qk_norm the head is a LayerNorm, as in vit-pytorch, and has no classes: num_classes '
                f'must be dim, {self.dim}, or 0 for the pooled features, not {self.num_classes}.'
            )
        super().__post_init__()

    @nn.nowrap
    def pos_embedding(self) -> Float32[np.ndarray, 'tokens dim']:
        """The position table of this image size; a constant, not a parameter."""
        return posemb_sincos_2d(*self.grid, self.dim)

    def setup(self) -> None:
        image_size = pair(self.image_size)
        self.to_patch_embedding = patch_embedding(
            self, sizes=f'height and width {image_size}', fits=lambda *size: size == image_size
        )
        if self.num_register_tokens:
            shape = self.num_register_tokens, self.dim
            self.register_tokens = self.param('register_tokens', nn.initializers.normal(1.0), shape, self.param_dtype)
        self.transformer = self.transformer_alone()
        self.to_latent = Identity()
        if self.num_classes:
            head = self.layer_norm() if self.qk_norm else self.linear(self.dim, self.num_classes)
            self.linear_head: Any = [self.layer_norm(), head] if self.norm_after_mean else head

    @nn.nowrap
    def transformer_alone(self) -> Transformer:
        """Its Transformer, nobody's child."""
        return self.inner(Transformer, final_norm=not self.norm_after_mean)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        x = sequential(self.to_patch_embedding, images, train=train)
        x = x + self.pos_embedding()[None].astype(x.dtype)
        if self.num_register_tokens:
            x = jnp.concatenate([x, of_each_image(x, self.register_tokens)], axis=1)
        x = self.transformer(x, train=train)[:, : math.prod(self.grid)]
        x = self.to_latent(x.mean(axis=1))
        return sequential(self.linear_head, x, train=train) if self.num_classes else x
