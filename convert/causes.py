"""Why a part of the port differs from PyTorch: the part in plain numpy, with each known mistake in turn.

The right computation is short. Most mistakes are the right computation with a tensor read wrongly (rows of `to_qkv` in
another order, a kernel not transposed, queries without their scale), which also explains a parameter that was
converted wrongly; the rest are arguments of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict
from scipy.special import erf

from convert.params import leaf
from flax_vit import SimpleViT
from flax_vit.layers import pair

# The right cause leaves what two float64 runs of one formula differ by: at most 1e-12 (`verify`'s own limit), and a few
# times that where a mistake makes the formula ill-conditioned. The mildest of the mistakes, an epsilon of 1e-6, moves a
# part of variance 1 by 5e-6. Between the two there is room on both sides.
FITS = 1e-9
# Where the part hardly depends on the mistake (an epsilon beside a variance of 1e4), it must also do away with most of
# what is wrong.
BETTER = 1e-2
# A cause that is itself rounding repeats only in part, numpy and XLA not rounding alike: it must explain half.
EXPLAINS = 0.5
# Cancellation does not repeat at all: its size must agree, within this factor.
SAME_SIZE = 4.0

HIGHEST = "set precision='highest'"


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to the 10 bits behind the point that the products of a tensor core keep, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'float64': lambda x: x,
    'float32': lambda x: x.astype(np.float32),
    'TF32': to_tf32,
    'bfloat16': lambda x: x.astype(ml_dtypes.bfloat16),
    'float16': lambda x: x.astype(np.float16),
}
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'erf': lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    'tanh': lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    'sigmoid': lambda x: x / (1 + np.exp(-1.702 * x)),
    'relu': lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Way:
    """A way to compute the parts of a model for one image, in float64. The defaults are PyTorch's."""

    model: nn.Module
    tensors: Mapping[str, np.ndarray]  # PyTorch's names and shapes; also a SimpleViT's 'pos_embedding'
    heads: int
    cut: str = '(h p1) (w p2) c -> (h w) (p1 p2 c)'
    class_token: str = 'first'
    epsilons: Mapping[str, float] = field(default_factory=dict)  # of the norms where it is not 1e-5
    variance: str = 'two-pass'
    statistics: str = 'float64'  # of the norms
    left_out: frozenset[str] = frozenset()  # norms, 'residual', 're-attention'
    softmax: str = 'float64'
    softmax_axis: int = -1  # of heads, queries, keys
    reattention_axis: int = 0
    join: str = 'n (h d)'
    activation: str = 'erf'
    final_norm: str | None = None  # its name, None: no norm here
    norm_when: str = 'before'  # pooling
    pool: str = 'mean'
    products: str = 'float64'  # what the inputs of matrix products are rounded to

    def compute(self, part: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """The output of the part that PyTorch calls so; `inputs` as `part_inputs` gives them."""
        if 'residual' in self.left_out:
            inputs = inputs[-1:]
        x = sum(inputs[1:], start=inputs[0])
        if part.startswith('to_patch_embedding'):
            return self.patch_embedding(x)
        if part == 'to_latent':
            return self.pooled(x)
        if part == '':
            return self.logits(x)
        if part == 'transformer.layers.0.0':
            x = self.embedded(x)
        return self.attention(x, part) if part.endswith('.0') else self.feed_forward(x, part)

    def patch_embedding(self, image: np.ndarray) -> np.ndarray:
        """(height, width, channels) -> (tokens, dim)."""
        rows, columns = pair(self.model.patch_size)
        x = rearrange(image, self.cut, p1=rows, p2=columns)
        if not self.model.patch_norm:
            return self.linear(x, 'to_patch_embedding.1')
        x = self.linear(self.norm(x, 'to_patch_embedding.1'), 'to_patch_embedding.2')
        return self.norm(x, 'to_patch_embedding.3')

    def embedded(self, x: np.ndarray) -> np.ndarray:
        """The tokens with the class token and their positions."""
        if 'cls_token' in self.tensors:
            tokens = [self.tensors['cls_token'][0], x]
            x = np.concatenate(tokens if self.class_token == 'first' else tokens[::-1])
        return x + self.tensors['pos_embedding'].reshape(-1, x.shape[1])[: len(x)]

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        qkv = self.linear(self.norm(x, f'{name}.norm'), f'{name}.to_qkv')
        q, k, v = rearrange(qkv, 'n (qkv h d) -> qkv h n d', qkv=3, h=self.heads)
        dots = self.product(q, k.swapaxes(1, 2)) * q.shape[-1] ** -0.5
        rounded = ROUNDINGS[self.softmax](dots)
        attn = np.exp(rounded - rounded.max(axis=self.softmax_axis, keepdims=True))
        attn = np.asarray(attn / attn.sum(axis=self.softmax_axis, keepdims=True), np.float64)
        if f'{name}.reattn_weights' in self.tensors and 're-attention' not in self.left_out:
            mix = self.tensors[f'{name}.reattn_weights']
            attn = np.moveaxis(self.product(np.moveaxis(attn, 0, -1), mix), -1, 0)
            last = np.moveaxis(attn, self.reattention_axis, -1)
            attn = np.moveaxis(self.norm(last, f'{name}.reattn_norm.1'), -1, self.reattention_axis)
        out = self.product(attn, v)
        joined = out.reshape(len(x), -1) if self.join == 'reshape' else rearrange(out, f'h n d -> {self.join}')
        return self.linear(joined, f'{name}.to_out' if isinstance(self.model, SimpleViT) else f'{name}.to_out.0')

    def feed_forward(self, x: np.ndarray, name: str) -> np.ndarray:
        last = 3 if isinstance(self.model, SimpleViT) else 4  # DeepViT has a Dropout in between
        x = ACTIVATIONS[self.activation](self.linear(self.norm(x, f'{name}.net.0'), f'{name}.net.1'))
        return self.linear(x, f'{name}.net.{last}')

    def pooled(self, x: np.ndarray) -> np.ndarray:
        if self.final_norm and self.norm_when == 'before':
            x = self.norm(x, self.final_norm)
        x = {'cls': x[:1], 'mean': x, 'last': x[-1:], 'mean of the others': x[1:]}[self.pool].mean(axis=0)
        return self.norm(x, self.final_norm) if self.final_norm and self.norm_when == 'after' else x

    def logits(self, x: np.ndarray) -> np.ndarray:
        if not self.model.num_classes:
            return x
        if 'linear_head.weight' in self.tensors:
            return self.linear(x, 'linear_head')
        head = 'linear_head' if isinstance(self.model, SimpleViT) else 'mlp_head'
        return self.linear(self.norm(x, f'{head}.0'), f'{head}.1')

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.product(x, self.tensors[f'{name}.weight'].T) + self.tensors.get(f'{name}.bias', 0.0)

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (np.asarray(ROUNDINGS[self.products](x), np.float64) for x in (a, b))
        return a @ b

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        if name in self.left_out:
            return x
        rounded = ROUNDINGS[self.statistics](x)
        mean = rounded.mean(axis=-1, keepdims=True)
        if self.variance == 'fast':
            variance = np.maximum((rounded * rounded).mean(axis=-1, keepdims=True) - mean * mean, 0)
        else:
            variance = rounded.var(axis=-1, keepdims=True, ddof=1 if self.variance == 'unbiased' else 0)
        normalised = (rounded - mean) / np.sqrt(variance + self.epsilons.get(name, 1e-5))
        return normalised * self.tensors[f'{name}.weight'] + self.tensors[f'{name}.bias']


def right_way(model: nn.Module, tensors: Mapping[str, np.ndarray], part: str) -> Way:
    """PyTorch's way, with the tensors that the part and the tokens before it need."""
    needed = (*owned(part), 'pos_embedding', 'cls_token')
    if part == 'to_latent':
        needed += ('mlp_head.0.', 'linear_head.0.')  # the norms that may be taken before pooling by mistake
    exact = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items() if name.startswith(needed)}
    if isinstance(model, SimpleViT):
        exact['pos_embedding'] = np.asarray(model.pos_embedding(), np.float64)
        final_norm = None if model.norm_after_mean else 'transformer.norm'
        return Way(model, exact, model.heads, final_norm=final_norm)
    return Way(model, exact, model.heads, pool=model.pool)


def part_inputs(way: Way, image: np.ndarray, outputs: Mapping[str, np.ndarray], part: str) -> list[np.ndarray]:
    """What a part takes, as the addends of the residual stream, the output of the part before it last.

    `image`: (height, width, channels); `outputs`: PyTorch's of the earlier parts, in computing order. Of the first
    block it is the patch embedding alone: class token and positions count as the first attention's.
    """
    before = list(outputs)[: list(outputs).index(part)]
    if not before:
        return [np.asarray(image, np.float64)]
    if part == '' or len(before) == 1:
        return [outputs[before[-1]]]
    return [way.embedded(outputs[before[0]]), *(outputs[name] for name in before[1:])]


def owned(part: str) -> tuple[str, ...]:
    """The beginnings of the names of the parameters that a part depends on."""
    if part.startswith('to_patch_embedding'):
        return ('to_patch_embedding.',)
    positions = ('pos_embedding', 'cls_token') if part == 'transformer.layers.0.0' else ()
    ends = {'to_latent': ('transformer.norm.',), '': ('mlp_head.', 'linear_head.')}
    return ends.get(part, (f'{part}.', *positions))


@dataclass(frozen=True)
class Mistake:
    """What somebody did otherwise: arguments of a Way and tensors read wrongly."""

    words: str  # after 'matches'
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def applied(self, way: Way) -> Way:
        return replace(way, **self.fields, tensors={**way.tensors, **self.tensors})

    def and_also(self, other: 'Mistake') -> 'Mistake':
        words = f'{self.words} and {other.words}'
        return Mistake(words, {**self.fields, **other.fields}, {**self.tensors, **other.tensors})


def mistakes(way: Way, part: str, tokens: int) -> Iterator[Mistake]:
    """Every known mistake that the part's sizes allow; `tokens` is the number of rows that a block puts out."""
    tensors = {name: tensor for name, tensor in way.tensors.items() if name.startswith(owned(part))}
    yield from _mistakes_of_norms(tensors, part, way)
    yield from _mistakes_of_tensors(tensors, part)
    if part.startswith('to_patch_embedding'):
        yield from _mistakes_of_patches(way, tensors)
    elif part == 'to_latent':
        yield from _mistakes_of_pooling(way)
    elif part.endswith('.0'):
        yield from _mistakes_of_attention(way, tensors, part, tokens)
    elif part:
        words = "with the tanh approximation of GELU (flax's default) instead of erf"
        yield Mistake(words, {'activation': 'tanh'})
        yield Mistake('with the sigmoid approximation of GELU instead of erf', {'activation': 'sigmoid'})
        yield Mistake('with ReLU instead of GELU', {'activation': 'relu'})
    if part == 'transformer.layers.0.0':
        for words, table in position_mistakes(way.model, way.tensors['pos_embedding']).items():
            yield Mistake(words, tensors={'pos_embedding': table})
        if 'cls_token' in way.tensors:
            yield Mistake('with the class token last instead of first', {'class_token': 'last'})
    elif part == 'to_latent' or part.startswith('transformer.layers'):
        yield Mistake('without the residual connection before it', {'left_out': frozenset({'residual'})})


def _mistakes_of_norms(tensors: Mapping[str, np.ndarray], part: str, way: Way) -> Iterator[Mistake]:
    norms = [
        name.removesuffix('.weight')
        for name, tensor in tensors.items()
        if name.endswith('.weight') and tensor.ndim == 1
    ]
    groups = {'': norms} | ({f' in {short(norm, part)}': [norm] for norm in norms} if len(norms) > 1 else {})
    for where, group in groups.items() if norms else ():
        for epsilon, whose in {1e-6: " (flax's default)", 1e-12: '', 1e-3: ''}.items():
            words = f'with a LayerNorm epsilon of {epsilon:g}{whose} instead of 1e-05{where}'
            yield Mistake(words, {'epsilons': dict.fromkeys(group, epsilon)})
    for norm in norms if part != 'to_latent' else ():
        yield Mistake(f'without the LayerNorm {short(norm, part)}', {'left_out': frozenset({norm})})
    if norms:
        yield Mistake('with n - 1 instead of n in the variance of LayerNorm', {'variance': 'unbiased'})


def _mistakes_of_tensors(tensors: Mapping[str, np.ndarray], part: str) -> Iterator[Mistake]:
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 1 and name != 'pos_embedding':
            yield Mistake(f'with {short(name, part)} transposed', tensors={name: tensor.T})
        if name.endswith('.bias'):
            yield Mistake(f'without {short(name, part)}', tensors={name: np.zeros_like(tensor)})
    for dtype in ('float32', 'bfloat16', 'float16'):
        rounded = {name: np.asarray(ROUNDINGS[dtype](tensor), np.float64) for name, tensor in tensors.items()}
        if any(not np.array_equal(rounded[name], tensor) for name, tensor in tensors.items()):
            yield Mistake(f'with parameters rounded to {dtype} (param_dtype?)', tensors=rounded)


def _mistakes_of_patches(way: Way, tensors: Mapping[str, np.ndarray]) -> Iterator[Mistake]:
    rows, columns = pair(way.model.patch_size)
    called = {'p1': 'rows', 'p2': 'columns', 'c': 'channels'}
    first = [name for name in tensors if name.startswith('to_patch_embedding.1.') and way.model.patch_norm]
    weight = 'to_patch_embedding.2.weight' if way.model.patch_norm else 'to_patch_embedding.1.weight'
    for order in permutations(called):
        if order != tuple(called):
            pattern = f'... ({" ".join(order)}) -> ... (p1 p2 c)'
            read = partial(rearrange, pattern=pattern, p1=rows, p2=columns)
            words = f"with a patch's values in the order {', '.join(called[axis] for axis in order)}"
            yield Mistake(words, tensors={name: read(tensors[name]) for name in (*first, weight)})
    patterns = {
        'with the patches column by column instead of row by row': '(h p1) (w p2) c -> (w h) (p1 p2 c)',
        'with patches of every so many pixels instead of neighbours': '(p1 h) (p2 w) c -> (h w) (p1 p2 c)',
    }
    for words, pattern in patterns.items():
        yield Mistake(words, {'cut': pattern})


def _mistakes_of_attention(way: Way, tensors: Mapping[str, np.ndarray], part: str, tokens: int) -> Iterator[Mistake]:
    qkv_name = f'{part}.to_qkv.weight'
    out_name = next(name for name in tensors if name.startswith(f'{part}.to_out') and name.endswith('weight'))
    qkv, out = tensors[qkv_name], tensors[out_name]
    inner_dim = out.shape[1]
    dim_head = inner_dim // way.heads

    def read(split: str) -> dict[str, np.ndarray]:
        return {qkv_name: rearrange(qkv, f'({split}) n -> (qkv h d) n', qkv=3, h=way.heads)}

    for axes in permutations(('qkv', 'h', 'd')):
        split = ' '.join(axes)
        if split != 'qkv h d':
            yield Mistake(f"if to_qkv is split as '({split})' instead of '(qkv h d)'", tensors=read(split))
    thirds = dict(zip('qkv', np.split(qkv, 3), strict=True))
    for order in permutations('qkv'):
        if order != ('q', 'k', 'v'):
            taken = np.concatenate([thirds['qkv'[order.index(name)]] for name in 'qkv'])
            yield Mistake(f'if the thirds of to_qkv are taken as {", ".join(order)}', tensors={qkv_name: taken})
    joined = {out_name: rearrange(out, 'n (d h) -> n (h d)', h=way.heads)}
    yield Mistake("if the heads are joined as '(d h)' instead of '(h d)'", tensors=joined)
    yield Mistake("if '(d h)' is meant instead of '(h d)', split and joined", tensors=read('qkv d h') | joined)
    yield Mistake('if the heads are joined by a reshape without moving their axis', {'join': 'reshape'})

    scales = {'without the scale': 1.0, 'with the scale 1 / dim_head': 1 / dim_head}
    scales |= {f'with the scale {size}**-0.5 (dim) instead of {dim_head}**-0.5': size**-0.5 for size in {qkv.shape[1]}}
    scales |= {
        f'with the scale {size}**-0.5 (heads x dim_head) instead of {dim_head}**-0.5': size**-0.5
        for size in {inner_dim} - {qkv.shape[1]}
    }
    for words, scale in scales.items():
        # as good as the wrong scale: queries that are larger by as much
        factors = np.where(np.arange(3 * inner_dim) < inner_dim, scale * dim_head**0.5, 1.0)
        yield Mistake(words, tensors={qkv_name: qkv * factors[:, None]})
    yield Mistake('with the softmax over queries instead of keys', {'softmax_axis': -2})
    yield Mistake('with the softmax over heads instead of keys', {'softmax_axis': 0})
    if f'{part}.reattn_weights' not in tensors:
        for heads in range(1, inner_dim + 1):
            if inner_dim % heads == 0 and heads != way.heads:
                yield Mistake(f'if heads={heads} instead of {way.heads}', {'heads': heads})
        return
    identity = {f'{part}.reattn_weights': np.eye(way.heads)}
    yield Mistake('without re-attention', {'left_out': frozenset({'re-attention'})})
    yield Mistake('without the mixing of heads, but with its LayerNorm', tensors=identity)
    for axis, called in {1: 'queries', 2: 'keys'}.items() if tokens == way.heads else ():
        yield Mistake(f'with re-attention normalised over {called} instead of heads', {'reattention_axis': axis})


def _mistakes_of_pooling(way: Way) -> Iterator[Mistake]:
    ways = {
        'cls': 'the class token',
        'mean': 'the mean of all tokens',
        'mean of the others': 'the mean of all tokens but the first',
        'last': 'the last token',
    }
    if isinstance(way.model, SimpleViT):
        ways['cls'] = 'the first token'
    for pool, called in ways.items():
        if pool != way.pool:
            yield Mistake(f'if pooled by {called} instead of {ways[way.pool]}', {'pool': pool})
    if way.final_norm:
        yield Mistake('without the LayerNorm before pooling (it is in the head, or nowhere)', {'final_norm': None})
        yield Mistake('with the LayerNorm after instead of before pooling', {'norm_when': 'after'})
    for head in ('mlp_head.0', 'linear_head.0'):
        if f'{head}.bias' in way.tensors:
            yield Mistake(f'with the LayerNorm {head} before pooling instead of in the head', {'final_norm': head})
            yield Mistake(
                f'with the LayerNorm {head} already in the pooled features', {'final_norm': head, 'norm_when': 'after'}
            )


def position_mistakes(model: nn.Module, right: np.ndarray) -> dict[str, np.ndarray]:
    """Position tables that are wrong, by the words for it."""
    tables = {'without positions': np.zeros_like(right)}
    if not isinstance(model, SimpleViT):
        return tables | {
            'if the class token takes the last position': np.roll(right, 1, axis=1),
            "if the patches start at the class token's position": np.roll(right, -1, axis=1),
            'if the class token gets no position': np.concatenate([0 * right[:, :1], right[:, 1:]], axis=1),
        }
    height, width = model.grid
    quarter = model.dim // 4
    axes = 'n (side function frequency)'
    sizes = {'side': 2, 'function': 2}
    exact = sincos(height, width, quarter, quarter - 1)
    return tables | {
        'with the axes of the sincos table swapped (y before x)': np.roll(right, 2 * quarter, axis=1),
        'with cosines before sines': rearrange(right, f'{axes} -> n side function frequency', **sizes)[
            :, :, ::-1
        ].reshape(right.shape),
        'with sines and cosines in turn': rearrange(right, f'{axes} -> n (side frequency function)', **sizes),
        'with the sincos table column by column': rearrange(right, '(h w) d -> (w h) d', h=height),
        'with frequencies of steps 4 / dim instead of 1 / (dim / 4 - 1)': sincos(height, width, quarter, quarter),
        'with the sincos table computed in float64': exact,
        'with the sincos table computed in float64, then rounded': exact.astype(np.float32).astype(np.float64),
    }


def sincos(height: int, width: int, quarter: int, steps: int) -> np.ndarray:
    """The sincos table (tokens, dim) in float64, with `quarter` frequencies."""
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:height, :width])
    omega = 10_000.0 ** -(np.arange(quarter) / steps)
    return np.concatenate([function(angle * omega) for angle in (x, y) for function in (np.sin, np.cos)], axis=1)


def rounding_mistakes(dtype: str) -> Iterator[Mistake]:
    """What computes with fewer bits than `dtype` has, or loses them. The words go after 'with'."""
    order = ['float64', 'float32', 'TF32', 'bfloat16']
    for coarser in order[order.index(dtype) + 1 :] if dtype in order else ():
        if coarser == 'float32':
            yield Mistake('matrix products in float32', {'products': coarser})
        else:
            name = 'TF32 or float16' if coarser == 'TF32' else coarser  # both keep 10 bits
            yield Mistake(f'matrix products in {name} ({HIGHEST})', {'products': coarser})
        if coarser != 'TF32':
            yield Mistake(f'the softmax in {coarser}', {'softmax': coarser})
            yield Mistake(f'the statistics of LayerNorm in {coarser}', {'statistics': coarser})
    if dtype in {'float64', 'float32'}:
        words = "the fast variance of LayerNorm (flax's default; use_fast_variance=False)"
        yield Mistake(words, {'variance': 'fast', 'statistics': dtype})


def causes(
    model: nn.Module,
    tensors: Mapping[str, np.ndarray],
    image: np.ndarray,
    truth: Mapping[str, np.ndarray],
    part: str,
    output: np.ndarray,
    variables: Mapping[str, Any] | None = None,
    dtype: str = 'float64',
) -> list[str]:
    """Why the port's output of a part is not PyTorch's, in words; more than one where they cannot be told apart.

    `model`: the right one. `tensors`: the source's, by today's names. `image` (height, width, channels) and `truth`,
    PyTorch's outputs for it in float64, by part in computing order, each without the axis of the batch. `output`: the
    port's, computed in `dtype`. `variables`: the port's, for a look whether they are the source's. Whatever is before
    the part is right.
    """
    with np.errstate(all='ignore'):  # a mistake may well overflow
        way = right_way(model, tensors, part)
        inputs = part_inputs(way, image, truth, part)
        known = list(mistakes(way, part, len(truth[part])))
        found, ours = wrong_parameters(way, part, known, variables or {})
        if found:
            if any(tensor.shape != way.tensors[name].shape for name, tensor in ours.items()):
                return found
            way = replace(way, tensors={**way.tensors, **ours})
            known = list(mistakes(way, part, len(truth[part])))
        right = way.compute(part, inputs)
        before = error(output, right)
        if found and before <= FITS:
            return found

        def fitting(candidates: list[Mistake]) -> list[str]:
            limit = min(FITS, BETTER * before)
            return [
                f'matches {mistake.words}'
                for mistake in candidates
                if error(output, mistake.applied(way).compute(part, inputs)) <= limit
            ]

        # Whoever took flax's default once did so wherever there is one.
        defaults = [mistake for mistake in known if "flax's default" in mistake.words and 'epsilons' in mistake.fields]
        pairs = [default.and_also(mistake) for default in defaults[:1] for mistake in known if mistake != default]
        fit = fitting(known) or fitting(pairs) or _rounding(way, part, inputs, output, dtype)
        return found + (fit or [f'none of the {len(known)} known mistakes fits: it is {compared(output, truth[part])}'])


def table_causes(model: nn.Module, table: np.ndarray, limit: float) -> list[str]:
    """Why a sincos table is not PyTorch's to within `limit`."""
    quarter = model.dim // 4
    height, width = model.grid
    right = sincos(height, width, quarter, quarter - 1)
    fit = [
        f'matches {words}'
        for words, wrong in position_mistakes(model, right).items()
        if np.abs(table - wrong).max() <= limit
    ]
    return fit or [f'no known mistake fits: it is {compared(table, right)}']


def wrong_parameters(
    way: Way, part: str, known: Sequence[Mistake], variables: Mapping[str, Any]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """In words, which of the part's parameters are not the source's bit for bit; and these, by name, as the port's."""
    wrong: dict[str, np.ndarray] = {}
    reasons: dict[str, list[str]] = {}
    for path, array in flatten_dict(variables.get('params', {})).items():
        rule = leaf(path, np.ndim(array))
        if not rule.name.startswith(owned(part)) or rule.name not in way.tensors:
            continue
        array = rule.to_torch(np.asarray(array))
        ours, theirs = np.asarray(array, np.float64), way.tensors[rule.name]
        if np.array_equal(ours, theirs):
            continue
        wrong[rule.name] = ours
        errors = {each.words: error(ours, each.tensors[rule.name]) for each in known if rule.name in each.tensors}
        last_place = 2 * float(ml_dtypes.finfo(array.dtype).eps)  # what the port's own dtype may have rounded besides
        fit = [words for words, rest in errors.items() if rest == 0]
        fit = fit or [words for words, rest in errors.items() if rest <= last_place]
        reason = f'matches {" or ".join(fit)}' if fit else compared(ours, theirs)
        reasons.setdefault(reason, []).append(rule.name)
    lines = []
    for reason, names in reasons.items():
        called = [short(name, part) for name in names]
        called = called if len(called) < 4 else [*called[:2], f'{len(called) - 2} more']
        largest = max(difference(wrong[name], way.tensors[name]) for name in names)
        lines.append(f"{', '.join(called)}: not the source's, at most {largest:.1e} apart; {reason}")
    return lines, wrong


def _rounding(way: Way, part: str, inputs: Sequence[np.ndarray], output: np.ndarray, dtype: str) -> list[str]:
    """The roundings that explain most of the error; failing that, those that make errors of its size."""
    right = way.compute(part, inputs)
    if output.shape != right.shape:
        return []
    whole = size(output - right)
    wrong = {mistake.words: mistake.applied(way).compute(part, inputs) for mistake in rounding_mistakes(dtype)}
    left = {words: size(output - each) for words, each in wrong.items()}
    best = min(left.values(), default=np.inf)
    if best <= EXPLAINS * whole:
        return [f'matches with {words}' for words, rest in left.items() if rest <= 1.1 * best]
    # The others would have repeated: with them, the same size is chance.
    sizes = {
        words: size(each - right) for words, each in wrong.items() if 'TF32' not in words and 'bfloat' not in words
    }
    same = [words for words, expected in sizes.items() if whole / SAME_SIZE <= expected <= SAME_SIZE * whole]
    return [f'the error has the size that comes of {" or ".join(same)}'] if same else []


def compared(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far two arrays are apart, and whether something simple lies between them."""
    if ours.shape != theirs.shape:
        return f'of shape {ours.shape} instead of {theirs.shape}'
    if not np.isfinite(ours).all():
        return f'not finite in {np.sum(~np.isfinite(ours))} of {ours.size} places'
    factor = float((ours * theirs).sum() / (theirs * theirs).sum()) if theirs.any() else 0.0
    if error(ours, factor * theirs) <= FITS and factor:
        return f"PyTorch's times {factor:.6g}"
    if not ours.any():
        return 'zero everywhere'
    if error(np.sort(ours, axis=None), np.sort(theirs, axis=None)) <= FITS:
        return "PyTorch's values in another order"
    ratio = size(ours) / size(theirs) if theirs.any() else np.inf
    return (
        f"{np.abs(ours - theirs).max():.1e} from PyTorch's at most, {size(ours - theirs) / (size(theirs) or 1):.1e} "
        f'of its size on the whole, and {ratio:.4g} times as large'
    )


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return difference(ours, theirs) / (float(np.abs(theirs).max()) or 1.0)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest; infinite where the shapes differ."""
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf


def size(x: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def short(name: str, part: str) -> str:
    """A parameter's name as one says it within its block."""
    return name.removeprefix(f'{part}.') if part.startswith('transformer') else name
