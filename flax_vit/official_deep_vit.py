"""DeepViT (Zhou et al. 2021, arXiv:2103.11886) as its authors trained it: `zhoudaquan/dvit_repo`.

Against vit-pytorch's DeepViT: re-attention is a convolution over the heads with a bias, then a BatchNorm, in some of
the blocks; biases in the attention, a LayerNorm epsilon of 1e-6, the branches scaled, and a stem of convolutions.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import Array, random
from jaxtyping import Float

from flax_vit import layers
from flax_vit.checks import check_fields, pair
from flax_vit.layers import (
    Identity,
    Images,
    LayerNorm,
    Model,
    Outputs,
    Tokens,
    add,
    at_least_float32,
    sequential,
    softmax,
    to_patches,
    uniform,
    with_class_token,
)
from flax_vit.mesh import COLUMNS, SHARED, Rules
from flax_vit.products import product

STEM = 64  # channels
BATCH_NORM_EPSILON, MOMENTUM = 1e-5, 0.1  # of torch.nn.BatchNorm2d
normal, zeros = nn.initializers.truncated_normal(0.02, lower=-100, upper=100), nn.initializers.zeros

# The registered models, by their names.
_LARGE: dict[str, Any] = {'dim': 420, 'depth': 32, 'mlp_dim': 1260, 'cnn_stem': True, 'scale_adjustment': 0.5}
_LARGE |= {'reattention': tuple(range(20, 32))}
_DIFFERENCES: dict[str, dict[str, Any]] = {
    **{
        f'deepvit_patch16_224_re_attn_{depth}b': {'dim': 384, 'depth': depth, 'mlp_dim': 1152}
        for depth in (16, 24, 32)
    },
    'deepvit_S': {
        'dim': 396, 'depth': 16, 'mlp_dim': 1188, 'cnn_stem': True, 'scale_adjustment': 0.5, 'transform_scale': True,
        'reattention': (11, 12, 13, 14, 15),
    },
    'deepvit_L': _LARGE,
    'deepvit_L_384': {**_LARGE, 'image_size': 384},
}  # fmt: skip
VARIANTS = {
    name: {'image_size': 224, 'patch_size': 16, 'heads': 12, **different} for name, different in _DIFFERENCES.items()
}


class BatchNorm(layers.Layer):
    """`torch.nn.BatchNorm2d`: with running statistics, or in training those of the batch, which move the running ones.

    The running variance is moved by the batch's unbiased one, as in PyTorch; linen's BatchNorm takes the biased one.
    """

    features: int
    axis: int  # of the features

    @nn.compact
    def __call__(self, x: Float[Array, '*shape'], *, train: bool) -> Float[Array, '*shape']:
        shape = (self.features,)
        scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        wide = at_least_float32(x.dtype)
        kept = at_least_float32(self.param_dtype)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, kept)
        running_variance = self.variable('batch_stats', 'var', jnp.ones, shape, kept)
        along = [1] * x.ndim
        along[self.axis] = self.features
        mean, variance = running_mean.value, running_variance.value
        if train:
            others = tuple(axis for axis in range(x.ndim) if axis != self.axis % x.ndim)
            mean = x.astype(wide).mean(axis=others)
            variance = ((x.astype(wide) - mean.reshape(along)) ** 2).mean(axis=others)
            if not self.is_initializing():
                number = x.size // self.features
                for running, new in ((running_mean, mean), (running_variance, variance * (number / (number - 1)))):
                    running.value = (1 - MOMENTUM) * running.value + MOMENTUM * new.astype(kept)
        mean, variance, scale, bias = (array.astype(wide).reshape(along) for array in (mean, variance, scale, bias))
        factor = scale * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON)
        return ((x.astype(wide) - mean) * factor + bias).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training leaves out the branch of some images, and scales that of the others up."""

    rate: float

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        if not train or self.rate == 0:
            return x
        kept = random.bernoulli(self.make_rng('dropout'), 1 - self.rate, (x.shape[0], 1, 1))
        return jnp.where(kept, x / (1 - self.rate), 0)


class Layer(layers.Layer, kw_only=True):
    layer_norm_epsilon: float

    def layer_norm(self) -> LayerNorm:
        return self.inner(LayerNorm, epsilon=self.layer_norm_epsilon)

    def linear(self, *sizes: Any, **options: Any) -> layers.Linear:
        return super().linear(*sizes, **options, kernel_init=normal, bias_init=zeros)


class Attention(Layer):
    """Attention, and re-attention (section 4.2 of the paper) where it is asked for."""

    dim: int
    heads: int
    dropout: float
    attention_dropout: float
    path_rate: float
    reattends: bool
    transform_scale: bool
    scale_adjustment: float
    qk_scale: float | None
    qkv_bias: bool

    def setup(self) -> None:
        self.norm = self.layer_norm()
        self.to_qkv = self.linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        self.attention_drop = nn.Dropout(self.attention_dropout)
        if self.reattends:
            self.reatten_matrix = self.inner(MixedHeads)
            self.var_norm = self.inner(BatchNorm, features=self.heads, axis=1)
        self.to_out = self.linear(self.dim, self.dim)
        self.dropped = nn.Dropout(self.dropout)
        self.drop_path = DropPath(self.path_rate)

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        qkv = self.to_qkv(self.norm(self.scale_adjustment * x))
        q, k, v = jnp.unstack(rearrange(qkv, 'b n (qkv h d) -> qkv b h n d', qkv=3, h=self.heads))
        scale = (self.dim // self.heads) ** -0.5 if self.qk_scale is None else self.qk_scale
        dots = product('bhid,bhjd->bhij', q, k, precision=self.precision) * scale
        attn = self.attention_drop(softmax(dots), deterministic=not train)
        if self.reattends:
            attn = self.var_norm(self.reatten_matrix(attn), train=train)
            attn = attn * scale if self.transform_scale else attn
        out = product('bhij,bhjd->bhid', attn, v, precision=self.precision)
        out = self.dropped(self.to_out(rearrange(out, 'b h n d -> b n (h d)')), deterministic=not train)
        return self.drop_path(out / self.scale_adjustment, train=train)


class MixedHeads(layers.Layer):
    """The heads' attention maps mixed: a convolution of 1 x 1 over the heads, with a bias."""

    heads: int

    @nn.compact
    def __call__(self, attn: Float[Array, 'batch heads i j']) -> Float[Array, 'batch heads i j']:
        init = uniform(self.heads**-0.5)
        kernel = self.param('kernel', init, (1, 1, self.heads, self.heads), self.param_dtype)
        bias = self.param('bias', init, (self.heads,), self.param_dtype)
        mix = jnp.broadcast_to(kernel[0, 0].T.astype(attn.dtype), (attn.shape[0], self.heads, self.heads))
        # with the batch on both sides, each image's product is a plain one, and the maps keep their shape
        mixed = product('boh,bhij->boij', mix, attn, precision=self.precision)
        return add(mixed, bias[:, None, None])


class FeedForward(Layer, layers.FeedForward, kw_only=True):
    path_rate: float
    scale_adjustment: float

    def setup(self) -> None:
        super().setup()
        self.drop_path = DropPath(self.path_rate)

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        x = sequential(self.net, self.scale_adjustment * x, train=train)
        return self.drop_path(x / self.scale_adjustment, train=train)


class Transformer(Layer, layers.Transformer, kw_only=True):
    """Its blocks differ: some re-attend, and each has its own rate of stochastic depth."""

    reattention: tuple[int, ...]
    transform_scale: bool
    scale_adjustment: float
    qk_scale: float | None
    qkv_bias: bool
    dropout: float
    attention_dropout: float
    drop_path: float

    def setup(self) -> None:
        rates = np.linspace(0, self.drop_path, self.depth).tolist()
        self.layers = [
            [
                self.inner(Attention, path_rate=rate, reattends=block in self.reattention),
                self.inner(FeedForward, path_rate=rate, hidden_dim=self.mlp_dim),
            ]
            for block, rate in enumerate(rates)
        ]
        self.norm = self.layer_norm()


class OfficialDeepViT(Model):
    """The paper's own DeepViT, by the names of vit-pytorch's arguments where it has them.

    Its variables have running statistics beside the parameters, {'params': …, 'batch_stats': …}; training with
    `train=True` moves them, `mutable=['batch_stats']`.

    Raises:
        ValueError: When the fields make no model.
    """

    ORIGIN: ClassVar[str] = 'dvit_repo'  # whose code computes it; else it is vit-pytorch's
    HEAD: ClassVar[str] = 'head'
    POSITIONS: ClassVar[str | None] = 'pos_embedding'
    # The modules of an attention that put out its maps; a dropout at rest puts out what it gets, the softmax.
    MAPS: ClassVar[Mapping[str, str]] = {'attention': 'attention_drop', 'reattention': 'var_norm'}
    # Fields that make other functions of them.
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('transform_scale', 'scale_adjustment', 'qk_scale', 'layer_norm_epsilon')
    SPLIT: ClassVar[Rules] = ((r'(^|/)head/kernel$', COLUMNS), *SHARED)  # of its parameters over a mesh
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS  # by the names that `named` knows
    patch_norm: ClassVar[bool] = False

    image_size: int | tuple[int, int]  # pixels; (height, width) when not square
    patch_size: int | tuple[int, int]  # pixels, likewise; it divides image_size
    num_classes: int  # 0: no head, the result is the normed class token (batch, dim)
    dim: int  # width of a token; a multiple of heads
    depth: int  # how many blocks, each of an attention and a feed-forward
    heads: int  # how many each attention has
    mlp_dim: int  # width of the hidden layer of a feed-forward
    channels: int = 3  # how many an image has
    cnn_stem: bool = False  # three convolutions, with BatchNorm, before the tokens; else one
    reattention: tuple[int, ...] | None = None  # the numbers of the blocks that have it; None: all
    transform_scale: bool = False  # the re-attended maps are scaled as queries x keys are
    scale_adjustment: float = 1.0  # of what a block's branches get; what they give is divided by it
    qk_scale: float | None = None  # of queries x keys; None: `(dim / heads)**-0.5`
    qkv_bias: bool = True  # whether queries, keys and values have one
    layer_norm_epsilon: float = 1e-6  # of every LayerNorm, added to the variance
    dropout: float = 0.0  # the share that drops out in training: of the first tokens, in feed-forwards, before sums
    attention_dropout: float = 0.0  # likewise, of the attention maps
    drop_path: float = 0.0  # stochastic depth of the last block, from 0 in the first
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    remat: bool = False  # the backward pass computes each layer's inside anew, instead of keeping it

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.heads:
            raise ValueError(f'OfficialDeepViT: dim={self.dim} must be a multiple of heads={self.heads}.')
        if self.cnn_stem and any(side % 2 for side in pair(self.patch_size)):
            raise ValueError(f'OfficialDeepViT: with cnn_stem, patch_size must be even, not {self.patch_size!r}.')
        if self.reattention is None:
            self.reattention = tuple(range(self.depth))
        blocks = self.reattention
        numbers = isinstance(blocks, tuple) and all(type(block) is int for block in blocks)
        if not numbers or list(blocks) != [block for block in range(self.depth) if block in blocks]:
            raise ValueError(
                f'OfficialDeepViT: reattention must be the numbers of blocks, from 0 to {self.depth - 1} in order, '
                f'not {blocks!r}.'
            )
        for name in ('scale_adjustment', 'layer_norm_epsilon', *(['qk_scale'] if self.qk_scale is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
                raise ValueError(f'OfficialDeepViT: {name} must be a number above 0, not {value!r}.')
        super().__post_init__()

    def setup(self) -> None:
        image_size, (rows, columns) = pair(self.image_size), pair(self.patch_size)
        cut = partial(to_patches, self, sizes=f'height and width {image_size}', fits=lambda *size: size == image_size)
        if self.cnn_stem:
            rows, columns = rows // 2, columns // 2
            conv = partial(self.inner, nn.Conv, features=STEM, use_bias=False)
            self.to_patch_embedding: Any = [
                partial(cut, to='b (h p1) (w p2) c'),
                conv(kernel_size=(7, 7), strides=2, padding=3, kernel_init=uniform((49 * self.channels) ** -0.5)),
                self.inner(BatchNorm, features=STEM, axis=-1),
                jax.nn.relu,
                conv(kernel_size=(3, 3), padding=1, kernel_init=uniform((9 * STEM) ** -0.5)),
                self.inner(BatchNorm, features=STEM, axis=-1),
                jax.nn.relu,
                partial(rearrange, pattern='b (h p1) (w p2) c -> b (h w) (p1 p2 c)', p1=rows, p2=columns),
                self.linear((rows, columns, STEM), self.dim),
            ]
        else:
            self.to_patch_embedding = [cut, self.linear((rows, columns, self.channels), self.dim)]
        shape = 1, math.prod(self.grid) + 1, self.dim
        self.pos_embedding = self.param('pos_embedding', normal, shape, self.param_dtype)
        self.cls_token = self.param('cls_token', normal, (1, 1, self.dim), self.param_dtype)
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.transformer = self.inner(Transformer, dim_head=self.dim // self.heads)
        self.to_latent = Identity()
        if self.num_classes:
            self.head = self.linear(self.dim, self.num_classes, kernel_init=normal, bias_init=zeros)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        x: Any = images
        for layer in self.to_patch_embedding:
            x = layer(x, train=train) if isinstance(layer, BatchNorm) else layer(x)
        x = x.astype(nn.dtypes.canonicalize_dtype(x, self.cls_token, self.pos_embedding, dtype=self.dtype))
        x = add(with_class_token(x, self.cls_token), self.pos_embedding)
        x = self.embedding_dropout(x, deterministic=not train)
        x = self.transformer(x, train=train)
        x = self.to_latent(x[:, 0])
        return self.head(x) if self.num_classes else x
