"""The known mistakes: each is a way to compute a part, or a tensor read wrongly.

The right computation is short. Most mistakes are the right computation with a tensor read wrongly (rows of `to_qkv` in
another order, a kernel not transposed, queries without their scale), which also explains a parameter that was
converted wrongly; the rest are arguments of it.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import permutations

import numpy as np
from einops import rearrange

from convert.architectures.way import ROUNDINGS, Mistake, Way, short
from flax_vit.checks import pair

HIGHEST = "set precision='highest'"
_EPSILONS = {1e-6: " (flax's default)", 1e-5: " (PyTorch's default)", 1e-12: '', 1e-3: ''}
_ACTIVATIONS = {
    'erf': "GELU by the error function (PyTorch's default)",
    'tanh': "the tanh approximation of GELU (flax's default)",
    'sigmoid': 'the sigmoid approximation of GELU',
}


def mistakes(way: Way, part: str, tokens: int) -> Iterator[Mistake]:
    """Every known mistake that the part's sizes allow; `tokens` is the number of rows that a block puts out."""
    tensors = {name: tensor for name, tensor in way.tensors.items() if name.startswith(way.owned(way.model, part))}
    yield from _mistakes_of_norms(tensors, part, way)
    yield from _mistakes_of_tensors(tensors, part)
    if part.startswith('to_patch_embedding'):
        yield from _mistakes_of_patches(way, tensors)
    elif part == 'to_latent':
        yield from _mistakes_of_pooling(way)
    elif part.endswith('.0'):
        yield from _mistakes_of_attention(way, tensors, part)
    elif part:
        for activation, words in _ACTIVATIONS.items():
            if activation != way.activation:
                yield Mistake(f'with {words} instead of {way.activation}', {'activation': activation})
        yield Mistake('with ReLU instead of GELU', {'activation': 'relu'})
    yield from way.own_mistakes(part, tokens)
    if part == 'transformer.layers.0.0':
        for words, table in way.position_mistakes().items():
            yield Mistake(words, tensors={'pos_embedding': table})
        if way.has_class_token:
            yield Mistake('with the class token last instead of first', {'class_token': 'last'})
    elif part == 'to_latent' or part.startswith('transformer.layers'):
        yield Mistake('without the residual connection before it', {'left_out': frozenset({'residual'})})


def _mistakes_of_norms(tensors: Mapping[str, np.ndarray], part: str, way: Way) -> Iterator[Mistake]:
    norms = [
        name.removesuffix('.weight')
        for name, tensor in tensors.items()
        if name.endswith('.weight') and tensor.ndim == 1
        if f'{name.removesuffix("weight")}running_mean' not in tensors  # a BatchNorm
    ]
    groups = {'': norms} | ({f' in {short(norm, part)}': [norm] for norm in norms} if len(norms) > 1 else {})
    for where, group in groups.items() if norms else ():
        for epsilon, whose in _EPSILONS.items():
            if epsilon != way.epsilon:
                words = f'with a LayerNorm epsilon of {epsilon:g}{whose} instead of {way.epsilon:g}{where}'
                yield Mistake(words, {'epsilons': dict.fromkeys(group, epsilon)}, default=bool(whose))
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
    if tensors[weight].ndim > 2:  # of a stem, which does not cut the images
        return
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


def _mistakes_of_attention(way: Way, tensors: Mapping[str, np.ndarray], part: str) -> Iterator[Mistake]:
    qkv_name = f'{part}.to_qkv.weight'
    out_name = f'{part}.{way.TO_OUT}.weight'
    qkv = tensors[qkv_name]
    inner_dim, dim = qkv.shape[0] // 3, qkv.shape[1]
    dim_head = inner_dim // way.heads

    bias_name = f'{part}.to_qkv.bias'
    rows = np.concatenate([qkv, tensors[bias_name][:, None]], axis=1) if bias_name in tensors else qkv

    def of_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {qkv_name: rows[:, :dim]} | ({bias_name: rows[:, dim]} if bias_name in tensors else {})

    def read(split: str) -> dict[str, np.ndarray]:
        return of_rows(rearrange(rows, f'({split}) n -> (qkv h d) n', qkv=3, h=way.heads))

    for axes in permutations(('qkv', 'h', 'd')):
        split = ' '.join(axes)
        if split != 'qkv h d':
            yield Mistake(f"if to_qkv is split as '({split})' instead of '(qkv h d)'", tensors=read(split))
    thirds = dict(zip('qkv', np.split(rows, 3), strict=True))
    for order in permutations('qkv'):
        if order != ('q', 'k', 'v'):
            taken = np.concatenate([thirds['qkv'[order.index(name)]] for name in 'qkv'])
            yield Mistake(f'if the thirds of to_qkv are taken as {", ".join(order)}', tensors=of_rows(taken))
    if out_name in tensors:
        joined = {out_name: rearrange(tensors[out_name], 'n (d h) -> n (h d)', h=way.heads)}
        yield Mistake("if the heads are joined as '(d h)' instead of '(h d)'", tensors=joined)
        yield Mistake("if '(d h)' is meant instead of '(h d)', split and joined", tensors=read('qkv d h') | joined)
    yield Mistake('if the heads are joined by a reshape without moving their axis', {'join': 'reshape'})

    right = way.scale or dim_head**-0.5
    roots = {inner_dim: 'heads x dim_head', dim_head: 'dim_head', dim: 'dim'}
    scales = {'without the scale': 1.0, 'with the scale 1 / dim_head': 1 / dim_head}
    scales |= {
        f'with the scale {size}**-0.5 ({what}) instead of {right**-2:.0f}**-0.5': size**-0.5
        for size, what in roots.items()
        if size**-0.5 != right
    }
    for words, scale in scales.items() if way.scale != 1 else ():  # where queries and keys are normalised
        # as good as the wrong scale: queries that are larger by as much
        factors = np.where(np.arange(3 * inner_dim) < inner_dim, scale / right, 1.0)
        yield Mistake(words, tensors=of_rows(rows * factors[:, None]))
    yield Mistake('with the softmax over queries instead of keys', {'softmax_axis': -2})
    yield Mistake('with the softmax over heads instead of keys', {'softmax_axis': 0})


def _mistakes_of_pooling(way: Way) -> Iterator[Mistake]:
    for pool, called in way.POOLS.items():
        if pool != way.pool:
            yield Mistake(f'if pooled by {called} instead of {way.POOLS[way.pool]}', {'pool': pool})
    if way.final_norm:
        yield Mistake('without the LayerNorm before pooling (it is in the head, or nowhere)', {'final_norm': None})
        if way.pool == 'mean':  # of one token it is the same
            yield Mistake('with the LayerNorm after instead of before pooling', {'norm_when': 'after'})
    norm = f'{way.model.HEAD}.0'
    if f'{norm}.bias' in way.tensors:
        if way.pool == 'mean':
            yield Mistake(f'with the LayerNorm {norm} before pooling instead of in the head', {'final_norm': norm})
        yield Mistake(
            f'with the LayerNorm {norm} already in the pooled features', {'final_norm': norm, 'norm_when': 'after'}
        )


def rounding_mistakes(dtype: str) -> Iterator[Mistake]:
    """What computes with fewer bits than `dtype` has, or loses them. The words go after 'with'."""
    order = ['float64', 'float32', 'TF32', 'bfloat16']
    for coarser in order[order.index(dtype) + 1 :] if dtype in order else ():
        repeats = coarser != 'float32'
        if coarser == 'float32':
            yield Mistake('matrix products in float32', {'products': coarser})
        else:
            name = 'TF32 or float16' if coarser == 'TF32' else coarser  # both keep 10 bits
            yield Mistake(f'matrix products in {name} ({HIGHEST})', {'products': coarser}, repeats=repeats)
        if coarser != 'TF32':
            yield Mistake(f'the softmax in {coarser}', {'softmax': coarser}, repeats=repeats)
            yield Mistake(f'the statistics of LayerNorm in {coarser}', {'statistics': coarser}, repeats=repeats)
    if dtype in {'float64', 'float32'}:
        words = "the fast variance of LayerNorm (flax's default; use_fast_variance=False)"
        yield Mistake(words, {'variance': 'fast', 'statistics': dtype})
