"""DeepViT (Zhou et al. 2021, arXiv:2103.11886) as vit-pytorch computes it: `vit_pytorch/deepvit.py`.

Submodules have the PyTorch names in the PyTorch order, so that PyTorch's `transformer.layers.3.1.net.4.weight`
is `transformer/layers_3_1/net_4/kernel` here.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from flax_vit import layers
from flax_vit.checks import check_fields
from flax_vit.layers import (
    EPSILON,
    FeedForward,
    Identity,
    Images,
    Keys,
    Layer,
    Model,
    Outputs,
    Queries,
    Tokens,
    add,
    at_least_float32,
    embedding_of_smaller_images,
    in_query_chunks,
    sequential,
    softmax,
    with_class_token,
)
from flax_vit.mesh import COLUMNS, SHARED, Rules
from flax_vit.products import product


class Attention(Layer):
    """Re-attention (section 4.2 of the paper): the heads' attention maps are mixed, then normalised across heads."""

    dim: int
    heads: int
    dim_head: int
    dropout: float
    query_chunk_size: int | None

    def setup(self) -> None:
        inner_dim = self.heads * self.dim_head
        self.norm = self.layer_norm()
        self.to_qkv = self.linear(self.dim, 3 * inner_dim, bias=False)
        self.attention_dropout = nn.Dropout(self.dropout)
        self.reattn_weights = self.param(
            'reattn_weights', nn.initializers.normal(1.0), (self.heads, self.heads), self.param_dtype
        )
        # in a list [Rearrange, LayerNorm, Rearrange] in PyTorch
        self.reattn_norm_1 = self.inner(HeadNorm)
        self.to_out = [self.linear(inner_dim, self.dim), nn.Dropout(self.dropout)]

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        qkv = self.to_qkv(self.norm(x))
        q, k, v = jnp.unstack(rearrange(qkv, 'b n (qkv h d) -> qkv b h n d', qkv=3, h=self.heads))

        out = in_query_chunks(self, partial(Attention.weigh, train=train), q, k, v, self.query_chunk_size)
        return sequential(self.to_out, rearrange(out, 'b h n d -> b n (h d)'), train=train)

    @nn.nowrap
    def weigh(self, q: Queries, k: Keys, v: Keys, *, train: bool) -> Queries:
        dots = product('bhid,bhjd->bhij', q, k, precision=self.precision) * self.dim_head**-0.5
        # vit-pytorch drops out the attention map before re-attention, not after it
        attn = self.attention_dropout(softmax(dots), deterministic=not train)
        attn = self.reattn_norm_1(attn, mix=self.reattn_weights)
        return product('bhij,bhjd->bhid', attn, v, precision=self.precision)


class HeadNorm(Layer):
    """The heads' attention maps mixed, then `torch.nn.LayerNorm` across the heads, which stay where they are.

    Bringing the heads to the last axis and back, as PyTorch does, costs more than all the rest of re-attention.
    """

    heads: int

    def setup(self) -> None:
        self.scale = self.param('scale', nn.initializers.ones, (self.heads,), self.param_dtype)
        self.bias = self.param('bias', nn.initializers.zeros, (self.heads,), self.param_dtype)

    def __call__(
        self, attn: Float[Array, 'batch heads i j'], *, mix: Float[Array, 'heads heads']
    ) -> Float[Array, 'batch heads i j']:
        batch, heads, _, _ = attn.shape
        wide = at_least_float32(attn.dtype)
        # The mean over the heads is linear: a matrix with centred rows gives the maps centred, with no pass over them.
        mix = mix.astype(wide)
        mix = (mix - mix.mean(axis=1, keepdims=True)).astype(attn.dtype)
        # With the batch on both sides, each image's product is a plain one, and the maps keep their shape.
        mix = jnp.broadcast_to(mix.T, (batch, heads, heads))
        centred = product('bgh,bhij->bgij', mix, attn, precision=self.precision).astype(wide)
        variance = mean_over_heads(centred**2)
        scale, bias = (parameter.astype(wide).reshape(1, heads, 1, 1) for parameter in (self.scale, self.bias))
        return (centred * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias).astype(attn.dtype)


def mean_over_heads(maps: Float[Array, 'batch heads i j']) -> Float[Array, 'batch 1 i j']:
    """The mean over the heads: on CPUs a sum of slices, which XLA makes one loop over the keys; elsewhere a reduction.

    Where heads lie on different devices, a reduction is one sum between them; slices would send single heads' maps.
    """

    def slices(maps: Array) -> Array:
        first, *others = jnp.split(maps, maps.shape[1], axis=1)
        return sum(others, first) / maps.shape[1]

    def reduction(maps: Array) -> Array:
        return maps.mean(axis=1, keepdims=True)

    return jax.lax.platform_dependent(maps, cpu=slices, default=reduction)


class Transformer(layers.Transformer):
    """DeepViT's, of tokens (batch, tokens, dim)."""

    dropout: float = 0.0

    @nn.nowrap
    def block(self) -> list[nn.Module]:
        return [self.inner(Attention), self.inner(FeedForward, hidden_dim=self.mlp_dim)]


class DeepViT(Model):
    """A vision transformer with re-attention, learned positions, a class token and dropout.

    The arguments are vit-pytorch's, with its defaults; `dtype`, `param_dtype` and `precision` are linen's.

    Raises:
        ValueError: When the fields make no model.
    """

    HEAD: ClassVar[str] = 'mlp_head'
    TRANSFORMER: ClassVar[type[nn.Module]] = Transformer
    POSITIONS: ClassVar[str | None] = 'pos_embedding'
    # The modules of an attention that put out its maps; a dropout at rest puts out what it gets, the softmax.
    MAPS: ClassVar[Mapping[str, str]] = {'attention': 'attention_dropout', 'reattention': 'reattn_norm_1'}
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('dim_head', 'pool')  # fields that make other functions of them
    SPLIT: ClassVar[Rules] = ((r'mlp_head_1/kernel$', COLUMNS), *SHARED)  # of its parameters over a mesh

    image_size: int  # pixels of a side; smaller images, also oblong ones, use the first positions
    patch_size: int  # pixels, likewise; it divides image_size
    num_classes: int  # 0: no head, the result is the pooled features (batch, dim)
    dim: int  # width of a token
    depth: int  # how many blocks, each of an attention and a feed-forward
    heads: int  # how many each attention has
    mlp_dim: int  # width of the hidden layer of a feed-forward
    pool: str = 'cls'  # 'cls': the class token; 'mean': the mean of all tokens, the class token's too
    channels: int = 3  # how many an image has
    dim_head: int = 64  # width of a query, key or value
    dropout: float = 0.0  # the share that drops out in training: of attention maps, in feed-forwards, before sums
    emb_dropout: float = 0.0  # likewise, of the tokens before the first block
    patch_norm: bool = True  # LayerNorms round the patch projection; vit-pytorch before 1.0.0 had none
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    query_chunk_size: int | None = None  # queries whose attention map is held at once; None: all. The same numbers
    remat: bool = False  # the backward pass computes each layer's inside anew, instead of keeping it
    scan_layers: bool = False  # one compiled block for any depth; parameters stacked, see `stack_layers`

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    def setup(self) -> None:
        self.to_patch_embedding = embedding_of_smaller_images(self)
        normal = nn.initializers.normal(1.0)
        shape = 1, math.prod(self.grid) + 1, self.dim
        self.pos_embedding = self.param('pos_embedding', normal, shape, self.param_dtype)
        self.cls_token = self.param('cls_token', normal, (1, 1, self.dim), self.param_dtype)
        self.embedding_dropout = nn.Dropout(self.emb_dropout)
        self.transformer = self.transformer_alone()
        self.to_latent = Identity()
        self.mlp_head = [self.layer_norm(), self.linear(self.dim, self.num_classes)] if self.num_classes else []

    @nn.nowrap
    def transformer_alone(self) -> Transformer:
        """Its Transformer, nobody's child."""
        return self.inner(Transformer, final_norm=False)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        x = sequential(self.to_patch_embedding, images, train=train)
        x = x.astype(nn.dtypes.canonicalize_dtype(x, self.cls_token, self.pos_embedding, dtype=self.dtype))
        x = with_class_token(x, self.cls_token)
        x = add(x, self.pos_embedding[:, : x.shape[1]])
        x = self.embedding_dropout(x, deterministic=not train)
        x = self.transformer(x, train=train)
        x = self.to_latent(x.mean(axis=1) if self.pool == 'mean' else x[:, 0])
        return sequential(self.mlp_head, x, train=train)
