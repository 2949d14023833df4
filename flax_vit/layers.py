"""What the models share: layers that start and compute as PyTorch's do, and the way images become patches."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.typing import Dtype, Initializer, Out, PrecisionLike
from jax import Array, random
from jaxtyping import Float, Shaped

from flax_vit.checks import IMAGE_FORMATS, check_fields, floating_dtype, pair
from flax_vit.mesh import laid_out_by_the_compiler
from flax_vit.products import product

EPSILON = 1e-5  # of torch.nn.LayerNorm

Images = Shaped[Array | np.ndarray, 'batch ...']
Tokens = Float[Array, 'batch tokens dim']
Queries = Float[Array, 'batch heads i d']
Keys = Float[Array, 'batch heads j d']  # and values
Outputs = Float[Array, 'batch outputs']


class Layer(nn.Module, kw_only=True):
    """A linen module that hands its fields on to what it is made of."""

    dtype: Dtype | None = None  # of the computation; None: what inputs and parameters promote to
    param_dtype: Dtype = jnp.float32  # of the parameters that `init` makes
    precision: PrecisionLike = None  # of matrix products; on GPU and TPU only 'highest' is really float32

    def __post_init__(self) -> None:
        # One object for each dtype, whatever it was given as: equal models have equal hashes.
        self.dtype = None if self.dtype is None else floating_dtype(f'{type(self).__name__}: dtype', self.dtype)
        self.param_dtype = floating_dtype(f'{type(self).__name__}: param_dtype', self.param_dtype)
        super().__post_init__()

    @nn.nowrap
    def inner(self, kind: type[Any], **fields: Any) -> Any:
        """A module of this class to be put inside, nobody's child yet; fields that both have are as here."""
        names, own = ({field.name for field in dataclasses.fields(each)} for each in (kind, self))
        shared = {name: getattr(self, name) for name in names & own - {'parent', 'name'}}
        return kind(**{**shared, **fields}, parent=None)

    def linear(
        self,
        in_features: int | tuple[int, ...],
        features: int | tuple[int, ...],
        *,
        bias: bool = True,
        **starts: Initializer,
    ) -> 'Linear':
        """`torch.nn.Linear(in_features, features, bias)`; `starts`: `kernel_init`, `bias_init`."""
        return self.inner(Linear, in_features=in_features, features=features, bias=bias, **starts)

    def layer_norm(self) -> 'LayerNorm':
        """`torch.nn.LayerNorm` of the last axis."""
        return self.inner(LayerNorm)


class Linear(Layer):
    """`torch.nn.Linear`; weight and bias have the names of linen's Dense.

    Of tuples, as linen's DenseGeneral has them, its parameters keep the axes; it works on the last axis all the same.
    """

    in_features: int | tuple[int, ...]
    features: int | tuple[int, ...]
    bias: bool = True
    kernel_init: Initializer | None = None  # None: as PyTorch's, uniform in ±1/√in_features
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
        shapes = [size if isinstance(size, tuple) else (size,) for size in (self.in_features, self.features)]
        matrix = tuple(map(math.prod, shapes))
        init = uniform(matrix[0] ** -0.5)

        def start(key: Array, shape: Sequence[int], dtype: Any) -> Array:
            return (self.kernel_init or init)(key, matrix, dtype).reshape(shape)

        kernel = self.param('kernel', start, (*shapes[0], *shapes[1]), self.param_dtype).reshape(matrix)
        bias = self.param('bias', self.bias_init or init, shapes[1], self.param_dtype) if self.bias else None
        dtype = nn.dtypes.canonicalize_dtype(x, kernel, bias, dtype=self.dtype)
        x = product('...i,io->...o', x.astype(dtype), kernel.astype(dtype), precision=self.precision)
        return x if bias is None else add(x, bias.reshape(-1))


class LayerNorm(Layer):
    """`torch.nn.LayerNorm` of the last axis: two-pass variance, statistics at least in float32.

    In PyTorch's order of operations, with the names of linen's LayerNorm: that one scales the reciprocal deviation
    first, for which the backward pass keeps an array as large as `x`, and takes a little longer on a CPU.
    """

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: Float[Array, '*batch features']) -> Float[Array, '*batch features']:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x, scale, bias = (aligned(array, x.ndim).astype(at_least_float32(dtype)) for array in (x, scale, bias))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(dtype)


class Identity(nn.Module):
    """`torch.nn.Identity`: gives its input a name that `capture_intermediates` can ask for."""

    def __call__(self, x: Float[Array, '*shape']) -> Float[Array, '*shape']:
        return x


@jax.checkpoint  # the backward pass keeps `x` alone, as PyTorch's, and not what the error function gave
def gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """`torch.nn.GELU()`: by the error function, not by its tanh approximation (flax's default).

    As PyTorch writes it, at least in float32: half precision would lose what 1 + erf leaves of a negative `x`. By the
    complementary error function, as in flax, it takes 2.5 times as long on a CPU.
    """
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def add(x: Float[Array, '*shape'], parameter: Float[Array, '...']) -> Float[Array, '*shape']:
    """`x` and a parameter that is broadcast to it, added at least in float32, in the dtype of `x`.

    The backward pass sums the parameter's gradient over the batch, in the dtype that was added in: PyTorch sums half
    precision in float32, XLA would not.
    """
    wide = at_least_float32(x.dtype)
    return (x.astype(wide) + aligned(parameter, x.ndim).astype(wide)).astype(x.dtype)


def at_least_float32(dtype: Dtype) -> Dtype:
    """`jnp.promote_types(dtype, jnp.float32)`, also where JAX is told to promote nothing."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def aligned(parameter: Float[Array, '*shape'], ndim: int) -> Float[Array, '...']:
    """With leading axes of size 1 up to `ndim`: JAX can be told not to broadcast arrays of unlike rank."""
    return jnp.expand_dims(parameter, tuple(range(ndim - parameter.ndim)))


def exponentials(
    x: Float[Array, '*batch n'],
) -> tuple[Float[Array, '*batch n'], Float[Array, '*batch 1']]:
    """Numerator and denominator of the softmax of the last axis, both at least in float32."""
    x = x.astype(at_least_float32(x.dtype))
    weights = jnp.exp(x - jax.lax.stop_gradient(x.max(axis=-1, keepdims=True)))
    return weights, weights.sum(axis=-1, keepdims=True)


def softmax(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """Softmax of the last axis, computed at least in float32, returned in the dtype of `x`."""
    weights, total = exponentials(x)
    return (weights / total).astype(x.dtype)


def weigh(
    q: Queries, k: Keys, v: Keys, *, attend: Callable[[Array], Array], scale: float, precision: PrecisionLike
) -> Queries:
    """The values, weighed by `attend` of the softmax of the scaled products of queries and keys."""
    dots = product('bhid,bhjd->bhij', q * scale, k, precision=precision)
    weights, total = exponentials(dots)
    softmax = (weights / total).astype(dots.dtype)
    attn = attend(softmax)
    if attn is softmax and attn.dtype == total.dtype:
        # Divided after the product: one pass over the map less; the compiler leaves out the division above. Not
        # where somebody has put another map in its place, and not in half precision, for which the sums of
        # undivided weights can be too large.
        return product('bhij,bhjd->bhid', weights, v, precision=precision) / total
    return product('bhij,bhjd->bhid', attn, v, precision=precision)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody keeps, or may replace, what goes in and out of the modules inside of this one."""
    interceptors = getattr(nn.module, '_global_interceptor_stack', True)  # of nn.intercept_methods; linen tells no one
    return bool(interceptors) or module.is_mutable_collection('intermediates')


def weigh_or_fuse(
    module: Any, q: Queries, k: Keys, v: Keys, *, attend: Callable[[Array], Array], scale: float, drops_out: bool
) -> Queries:
    """`weigh`, or where the attention `module` is to be fused, on NVIDIA GPUs cuDNN's attention, which holds no map.

    Not where somebody watches the map or something of it `drops_out`.
    """
    plain = partial(weigh, attend=attend, scale=scale, precision=module.precision)
    if module.attention == 'plain' or drops_out or is_watched(module):
        return plain(q, k, v)
    fused = partial(by_cudnn, scale=scale)
    try:  # it is for half precision and some sizes of heads, and only where cuDNN is installed
        jax.eval_shape(fused, q, k, v)
    except RuntimeError:  # of which NotImplementedError is one
        return plain(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=fused, default=plain)


def by_cudnn(q: Queries, k: Keys, v: Keys, *, scale: float) -> Queries:
    """The values, weighed by the softmax of the scaled products of queries and keys."""
    counts = {'query_seq_lengths': q.shape[2], 'key_value_seq_lengths': k.shape[2]}
    lengths: Any = {}
    if any(count % 2 for count in counts.values()):  # of which JAX has no gradient: filled up, and told so
        lengths = {name: jnp.full(len(q), count, jnp.int32) for name, count in counts.items()}
        q, k, v = (jnp.pad(each, ((0, 0), (0, 0), (0, each.shape[2] % 2), (0, 0))) for each in (q, k, v))
    q, k, v = (rearrange(each, 'b h n d -> b n h d') for each in (q, k, v))
    weighed = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation='cudnn', **lengths)
    return rearrange(weighed, 'b n h d -> b h n d')[:, :, : counts['query_seq_lengths']]


def sequential(layers: Any, x: Shaped[Array | np.ndarray, '...'], *, train: bool) -> Float[Array, '...']:
    """`torch.nn.Sequential`: the layers in turn, or the only one; Dropout acts in training only."""
    result: Any = x
    for layer in layers if isinstance(layers, Sequence) else [layers]:
        result = layer(result, deterministic=not train) if isinstance(layer, nn.Dropout) else layer(result)
    return result


def in_query_chunks(
    module: nn.Module,
    attend: Callable[..., Float[Array, 'batch heads chunk d']],
    queries: Float[Array, 'batch heads tokens d'],
    keys: Float[Array, 'batch heads tokens d'],
    values: Float[Array, 'batch heads tokens d'],
    size: int | None,
) -> Float[Array, 'batch heads tokens d']:
    """`attend(module, queries, keys, values)`, at most `size` queries at a time; None: all at once.

    The chunks follow one another, and the backward pass computes each anew, so that no attention map is larger than
    (batch, heads, size, tokens). Exact wherever a query's result needs no other query. The maps of an `attend` whose
    intermediates are captured are put together again.
    """
    tokens = queries.shape[2]
    if size is None or size >= tokens:
        return attend(module, queries, keys, values)
    count = -(-tokens // size)
    rows = -(-tokens // count)  # of a chunk, all alike; the last is filled up with zeros
    filled = jnp.pad(queries, ((0, 0), (0, 0), (0, count * rows - tokens), (0, 0)))

    def joined(chunks: Array) -> Array:
        return rearrange(chunks, 'b h count i d -> b h (count i) d')[:, :, :tokens]

    def step(module: Any, carry: None, chunk: Array, keys: Array, values: Array) -> tuple[None, Array]:
        return carry, attend(module, chunk, keys, values)

    scan: Any = nn.scan(
        step if is_concrete(queries) else nn.remat(step, prevent_cse=False),
        variable_broadcast='params',
        variable_axes={'intermediates': Out(2)},
        split_rngs={'params': False, 'dropout': True},
        in_axes=(2, nn.broadcast, nn.broadcast),
        out_axes=2,
    )
    scan = nn.map_variables(
        scan,
        'intermediates',
        trans_in_fn=lambda _: {},
        trans_out_fn=partial(jax.tree.map, joined),
        mutable=True,
    )
    chunks = rearrange(filled, 'b h (count i) d -> b h count i d', count=count)
    with loops_over(queries):
        return joined(scan(module, None, chunks, keys, values)[1])


def is_concrete(x: Array) -> bool:
    """Whether its numbers are there: outside of jit, grad and the like, where each operation is done at once."""
    return not isinstance(x, jax.core.Tracer)


def loops_over(x: Array) -> AbstractContextManager[None]:
    """Loops over a concrete `x` run in Python: linen's are new functions in each call, which JAX would compile anew."""
    return jax.disable_jit() if is_concrete(x) else nullcontext()


class FeedForward(Layer):
    """vit-pytorch's `FeedForward`."""

    ACTIVATION: ClassVar[Any] = staticmethod(gelu)

    dim: int
    hidden_dim: int
    dropout: float | None = None  # None: there is none, as in SimpleViT's, and its place in `net` isn't either

    def setup(self) -> None:
        first, second = self.linear(self.dim, self.hidden_dim), self.linear(self.hidden_dim, self.dim)
        drop, again = [[] if self.dropout is None else [nn.Dropout(self.dropout)] for _ in range(2)]
        self.net = [self.layer_norm(), first, self.ACTIVATION, *drop, second, *again]

    def __call__(self, x: Float[Array, 'batch tokens dim'], *, train: bool) -> Float[Array, 'batch tokens dim']:
        return sequential(self.net, x, train=train)


class Transformer(Layer):
    """`Transformer` of every model: attention and feed-forward in turn, each added to its input; tokens in and out.

    The arguments are vit-pytorch's. Its blocks are `layers_3_0` (attention) and `layers_3_1` (feed-forward), as in
    PyTorch; with `scan_layers` all are one, `blocks/layers_0` and `blocks/layers_1`, whose parameters have a first axis
    more, the depth.
    """

    # What the models say of themselves, see `architectures`.
    HEAD: ClassVar[str | None] = None
    POSITIONS: ClassVar[str | None] = None
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('heads', 'dim_head')

    dim: int
    depth: int
    heads: int
    dim_head: int
    mlp_dim: int
    final_norm: bool = True  # a LayerNorm of each token after the last block
    query_chunk_size: int | None = None
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @nn.nowrap
    def block(self) -> list[nn.Module]:
        """Attention and feed-forward, nobody's children yet. To be written by each model."""
        raise NotImplementedError

    def setup(self) -> None:
        if self.scan_layers:
            self.blocks = Block(layers=self.block())
        else:
            self.layers = [self.block() for _ in range(self.depth)]
        self.norm = self.layer_norm() if self.final_norm else Identity()

    @laid_out_by_the_compiler
    def __call__(
        self, tokens: Float[Array | np.ndarray, '...'], train: bool = False
    ) -> Float[Array, 'batch tokens dim']:
        """Tokens (batch, tokens, dim) of tokens. With `train`, dropout needs `rngs={'dropout': key}`.

        Raises ValueError for tokens of another size than `dim`.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f'A Transformer takes tokens of shape (batch, tokens, {self.dim}), not {tokens.shape}.')
        x = jnp.asarray(tokens)

        def run(layer: Any, x: Array) -> Array:
            return layer(x, train=train)

        if self.remat and not is_concrete(x):
            run = nn.remat(run, prevent_cse=not self.scan_layers)

        def block(layers: Sequence[Any], x: Array) -> Array:
            for layer in layers:
                x = run(layer, summed_apart(x)) + x
            return x

        if self.scan_layers:
            # what is carried from block to block keeps one dtype: the one that the blocks end in
            x = x.astype(self.dtype or jnp.result_type(x, *jax.tree.leaves(self.blocks.variables)))
            scan: Any = nn.scan(
                lambda blocks, x, _: (block(blocks.layers, x), None),
                variable_axes={'params': 0, 'intermediates': 0},
                split_rngs={'params': True, 'dropout': True},
                length=self.depth,
            )
            with loops_over(x):
                x, _ = scan(self.blocks, x, None)
        else:
            for layers in self.layers:
                x = block(layers, x)
        return self.norm(x)


class Model(Layer):
    """What the models share: what each says of itself, with what most of them say, and the call."""

    POSITIONS: ClassVar[str | None] = None  # the parameter; where there is none they are computed
    MAPS: ClassVar[Mapping[str, str]] = {'attention': 'attend'}  # the modules of an attention that put out its maps
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ()  # fields that make other functions of the same weights

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches in an image."""
        (height, width), (rows, columns) = pair(self.image_size), pair(self.patch_size)
        return height // rows, width // columns

    @laid_out_by_the_compiler
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Logits of images.

        Args:
            images: Floating-point numbers (batch, height, width, channels) or (batch, channels, height, width).
            train: Whether dropout acts, where the model has some, which takes its random numbers from
                `rngs={'dropout': key}` of `apply`, and whether a BatchNorm's statistics are the batch's.

        Returns:
            (batch, num_classes), or without a head what it would get.

        Raises:
            ValueError: When the images don't fit the model.
        """
        return self.outputs(images, train)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        """What the model computes. To be written by each model."""
        raise NotImplementedError


def summed_apart(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """`x`, by an operation of its own, so that the backward pass sums what a layer's uses of it give by themselves.

    Added to the gradient one after another, XLA for CPUs would compute all of them anew in every layer, which takes
    time and code by the square of the depth.
    """
    return 1 * x


class Block(nn.Module):
    """The layers that `Transformer` scans over."""

    layers: Sequence[nn.Module]


def with_class_token(
    x: Float[Array, 'batch tokens dim'], cls_token: Float[Array, '... 1 dim']
) -> Float[Array, 'batch tokens+1 dim']:
    """The tokens of each image, and the class token in front of them."""
    return jnp.concatenate([of_each_image(x, cls_token), x], axis=1)


def of_each_image(
    x: Float[Array, 'batch tokens dim'], learned: Float[Array, '... count dim']
) -> Float[Array, 'batch count dim']:
    """Learned tokens, once for each of the images, in the dtype of their tokens `x`."""
    return add(jnp.zeros((x.shape[0], *learned.shape[-2:]), x.dtype), learned)


def uniform(bound: float) -> Initializer:
    """Initial values uniform in [-bound, bound)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init


def to_patches(
    model: Any,
    images: Shaped[Array | np.ndarray, '...'],
    *,
    sizes: str,
    fits: Callable[[int, int], bool],
    to: str = 'b (h w) (p1 p2 c)',
) -> Float[Array, 'batch *tokens values']:
    """Cut images, channels last or channels first, into patches; a patch's values run over rows, columns, channels.

    `fits(height, width)` says which sizes `model` takes, `sizes` says it in words. Where both orders fit and the
    model's `image_format` is None, the channels are last, and a warning says so. Raises ValueError, with both shapes,
    when neither fits.
    """
    if not isinstance(getattr(images, 'dtype', None), np.dtype):
        kind = f'{type(images).__module__}.{type(images).__qualname__}'.removeprefix('builtins.')
        raise ValueError(
            f'{type(model).__name__} takes images as an array of JAX or NumPy, not a {kind}: numpy.asarray(images) '
            'converts what is in the memory of the CPU.'
        )
    shape, channels, asked = images.shape, model.channels, model.image_format
    formats = [
        name
        for name, sides, axis in (('channels_last', shape[1:3], 3), ('channels_first', shape[2:4], 1))
        if images.ndim == 4 and shape[axis] == channels and fits(*sides) and asked in (None, name)
    ]
    if not formats:
        both = {
            'channels_last': f'(batch, height, width, {channels})',
            'channels_first': f'(batch, {channels}, height, width)',
        }
        words = ' or '.join(both[name] for name in both if asked in (None, name))
        raise ValueError(
            f'{type(model).__name__} takes images of shape {words}, {sizes}; these have the shape {shape}.'
        )
    if len(formats) == 2:
        warnings.warn(
            f'Images of shape {shape} may have their {channels} channels last or first; {type(model).__name__} takes '
            "them as the last. image_format='channels_first' or 'channels_last' settles it.",
            stacklevel=2,
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f'{type(model).__name__} takes images of floating-point numbers, not {images.dtype}: '
            'convert and normalise them as in training.'
        )
    p1, p2 = pair(model.patch_size)
    return rearrange(jnp.asarray(images), f'{IMAGE_FORMATS[formats[0]]} -> {to}', p1=p1, p2=p2)


def patch_embedding(model: Any, *, sizes: str, fits: Callable[[int, int], bool]) -> list[Any]:
    """`to_patch_embedding` of a model: `to_patches` with these arguments, then a projection between LayerNorms."""
    cut = partial(to_patches, model, sizes=sizes, fits=fits)
    norms = [model.layer_norm(), model.layer_norm()] if model.patch_norm else []
    projection = model.linear(model.channels * math.prod(pair(model.patch_size)), model.dim)
    return [cut, *norms[:1], projection, *norms[1:]]


def embedding_of_smaller_images(model: Any) -> list[Any]:
    """`patch_embedding` of a model with learned positions, of which images with fewer patches take the first."""
    (rows, columns), patches = pair(model.patch_size), math.prod(model.grid)
    sides = rows if rows == columns else (rows, columns)
    return patch_embedding(
        model,
        sizes=f'height and width multiples of {sides}, at most {patches} patches of {rows} x {columns}',
        fits=lambda height, width: (
            height % rows == 0 and width % columns == 0 and 0 < (height // rows) * (width // columns) <= patches
        ),
    )
