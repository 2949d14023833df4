"""Simple ViT (Beyer, Zhai, Kolesnikov 2022, arXiv:2205.01580) as its authors trained it: big_vision's `models/vit.py`.

Against vit-pytorch's SimpleViT: biases in the attention, GELU by its tanh approximation, a LayerNorm epsilon of 1e-6,
no LayerNorms round the patches and, in the published weights, a hidden layer with tanh before the head.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32

from flax_vit import layers
from flax_vit.checks import check_fields, pair
from flax_vit.layers import (
    Identity,
    Images,
    Keys,
    LayerNorm,
    Model,
    Outputs,
    Queries,
    Tokens,
    at_least_float32,
    in_query_chunks,
    to_patches,
    weigh,
)
from flax_vit.mesh import COLUMNS, SHARED, Rules
from flax_vit.simple_vit import posemb_sincos_2d
from flax_vit.sizes import FIELDS

EPSILON = 1e-6  # of every LayerNorm, flax's default
lecun_normal, xavier_uniform = nn.initializers.lecun_normal(), nn.initializers.xavier_uniform()
almost_zeros, zeros = nn.initializers.normal(1e-6), nn.initializers.zeros


@jax.checkpoint  # the backward pass keeps `x` alone
def tanh_gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """GELU by its tanh approximation, at least in float32."""
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=True).astype(x.dtype)


class Layer(layers.Layer):
    def layer_norm(self) -> LayerNorm:
        return self.inner(LayerNorm, epsilon=EPSILON)


class Attention(Layer):
    dim: int
    heads: int
    dim_head: int
    query_chunk_size: int | None

    def setup(self) -> None:
        self.norm = self.layer_norm()
        self.attend = Identity()  # names the attention map
        starts: Any = {'kernel_init': xavier_uniform, 'bias_init': zeros}
        heads = self.heads, self.dim_head
        self.query, self.key, self.value = (self.linear(self.dim, heads, **starts) for _ in range(3))
        self.out = self.linear(heads, self.dim, **starts)

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        x = self.norm(x)
        q, k, v = (
            rearrange(part(x), 'b n (h d) -> b h n d', h=self.heads) for part in (self.query, self.key, self.value)
        )
        out = in_query_chunks(self, Attention.weigh, q, k, v, self.query_chunk_size)
        return self.out(rearrange(out, 'b h n d -> b n (h d)'))

    @nn.nowrap
    def weigh(self, q: Queries, k: Keys, v: Keys) -> Queries:
        return weigh(q, k, v, attend=self.attend, scale=self.dim_head**-0.5, precision=self.precision)


class FeedForward(Layer, layers.FeedForward):
    ACTIVATION = staticmethod(tanh_gelu)

    def linear(self, *sizes: Any, **options: Any) -> layers.Linear:
        return super().linear(*sizes, **options, kernel_init=xavier_uniform, bias_init=almost_zeros)


class Transformer(Layer, layers.Transformer):
    @nn.nowrap
    def block(self) -> list[nn.Module]:
        return [self.inner(Attention), self.inner(FeedForward, hidden_dim=self.mlp_dim)]


class OfficialSimpleViT(Layer, Model):
    """The paper's own Simple ViT, big_vision's ViT with posemb='sincos2d' and pool_type='gap'; it has no dropout.

    Raises:
        ValueError: When the fields make no model.
    """

    ORIGIN: ClassVar[str] = 'big_vision'  # whose code computes it; else it is vit-pytorch's
    HEAD: ClassVar[str] = 'head'
    SPLIT: ClassVar[Rules] = (  # of its parameters over a mesh; heads have an axis, so that nothing is gathered
        (r'/(query|key|value)/kernel$', PartitionSpec(None, 'model', None)),
        (r'/(query|key|value)/bias$', PartitionSpec('model', None)),
        (r'/out/kernel$', PartitionSpec('model', None, None)),
        (r'(^|/)head/kernel$', COLUMNS),
        *SHARED,
    )
    # By the names that `named` knows: that of the published weights.
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        'official_simple_vit_s16': {**FIELDS['s16'], 'rep_size': 384}
    }
    patch_norm: ClassVar[bool] = False

    image_size: int | tuple[int, int]  # pixels; (height, width) when not square. Images of other sizes are taken, too
    patch_size: int | tuple[int, int]  # pixels, likewise; it divides image_size
    num_classes: int  # 0: no head, the result is what it would get
    dim: int  # width of a token; a multiple of 4 and of heads
    depth: int  # how many blocks, each of an attention and a feed-forward
    heads: int  # how many each attention has
    mlp_dim: int  # width of the hidden layer of a feed-forward
    channels: int = 3  # how many an image has
    rep_size: int = 0  # of the hidden layer before the head, 'pre_logits'; 0: none
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    query_chunk_size: int | None = None  # queries whose attention map is held at once; None: all. The same numbers
    remat: bool = False  # the backward pass computes each layer's inside anew, instead of keeping it
    scan_layers: bool = False  # one compiled block for any depth; parameters stacked, see `stack_layers`

    def __post_init__(self) -> None:
        check_fields(self, dim=8, rep_size=0)
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(
                f'OfficialSimpleViT: dim must be a multiple of 4 for the sincos table, and of heads={self.heads}, '
                f'not {self.dim}.'
            )
        super().__post_init__()

    @nn.nowrap
    def pos_embedding(self, grid: tuple[int, int] | None = None) -> Float32[np.ndarray, 'tokens dim']:
        """The position table of so many rows and columns of patches, else of `image_size`; it is no parameter."""
        return posemb_sincos_2d(*(grid or self.grid), self.dim)

    def setup(self) -> None:
        rows, columns = pair(self.patch_size)

        cut = partial(
            to_patches,
            self,
            sizes=f'height and width multiples of {rows if rows == columns else (rows, columns)}',
            fits=lambda height, width: height % rows == 0 and width % columns == 0 and height * width > 0,
            to='b h w (p1 p2 c)',
        )
        projection = self.linear((rows, columns, self.channels), self.dim, kernel_init=lecun_normal, bias_init=zeros)
        self.to_patch_embedding: Any = [cut, projection]
        self.transformer = self.inner(Transformer, dim_head=self.dim // self.heads)
        self.to_latent = Identity()
        if self.rep_size:
            self.pre_logits = self.linear(self.dim, self.rep_size, kernel_init=lecun_normal, bias_init=zeros)
        if self.num_classes:
            inputs = self.rep_size or self.dim
            self.head = self.linear(inputs, self.num_classes, kernel_init=zeros, bias_init=zeros)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        cut, projection = self.to_patch_embedding
        grid = cut(images)
        x = projection(rearrange(grid, 'b h w values -> b (h w) values'))
        x = x + self.pos_embedding(grid.shape[1:3])[None].astype(x.dtype)
        x = self.transformer(x, train=train)
        x = self.to_latent(x.mean(axis=1))
        if self.rep_size:
            x = jnp.tanh(self.pre_logits(x))
        return self.head(x) if self.num_classes else x
