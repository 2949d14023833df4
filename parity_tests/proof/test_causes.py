"""`verify` names the cause: every slip, put into the port, is told by name, and nothing is named when all is right."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict

import convert
import flax_vit.deep_vit
import flax_vit.layers
import flax_vit.products
import flax_vit.simple_vit
from convert.architectures import architecture_of, simple_vit, way as ways
from convert.proof import causes, mistakes
from convert.proof.measure import size
from convert.proof.parity import Report, labels, verify
from convert.proof.torch_side import TorchSide
from convert.recognition import names as params
from flax_vit import SimpleViT
from parity_tests.proof import test_slips
from parity_tests.proof.test_slips import (
    CASES,
    DEEP,
    DROPOUT_SLIPS,
    MODELS,
    SIMPLE,
    SIMPLE_WITH_QK_NORM,
    SIMPLE_WITH_REGISTERS,
    SLIPS,
    VIT,
    VIT_MEAN,
    Port,
    Slip,
)
from parity_tests.support.reference import (
    CONFIGURATIONS,
    QUICK,
    Configuration,
    channels_first,
    converted,
    pytorch,
    pytorch_outputs,
    random_images,
)

EPSILON = "with a LayerNorm epsilon of 1e-06 (flax's default) instead of 1e-05"
TANH = "with the tanh approximation of GELU (flax's default) instead of erf"
QKV = "block 0 attention: to_qkv.weight: not the source's, at most … apart; matches"
POSITIONS = "block 0 attention: pos_embedding: not the source's, at most … apart; matches"
FAST = "the fast variance of LayerNorm (flax's default; use_fast_variance=False)"

# What `verify` says of each slip in test_slips.py; the dots stand for figures and for names of one model.
NAMED = {
    'tanh_gelu': f'block 0 feed-forward: matches {TANH}',
    'epsilon_of_flax': f'patch embedding: matches {EPSILON}',
    'epsilon_of_flax_in_reattention': f'block 0 attention: matches {EPSILON}',
    'fast_variance': f'patch embedding: the error has the size that comes of {FAST}',
    'softmax_in_float32': 'block 0 attention: … the softmax in float32',
    'softmax_over_queries': 'block 0 attention: matches with the softmax over queries instead of keys',
    'square_kernel_not_transposed': (
        "block 0 attention: to_out. … weight: not the source's, at most … apart; matches with to_out. … transposed"
    ),
    'values_first_then_queries_and_keys': f'{QKV} if the thirds of to_qkv are taken as k, v, q',
    'queries_and_keys_swapped': f'{QKV} if the thirds of to_qkv are taken as k, q, v',
    'queries_keys_and_values_per_head': (
        "block 0 attention: matches if to_qkv is split as '(h qkv d)' instead of '(qkv h d)'"
    ),
    'heads_inside_their_dimensions': (
        "block 0 attention: matches if to_qkv is split as '(qkv d h)' instead of '(qkv h d)'"
    ),
    'heads_joined_the_wrong_way': "block 0 attention: matches if the heads are joined as '(d h)' instead of '(h d)'",
    'heads_wrong': 'block 0 attention: matches if heads=6 instead of 4',
    'scale_missing': f'{QKV} without the scale',
    'channels_before_the_pixels_of_a_patch': (
        "patch embedding: matches with a patch's values in the order channels, rows, columns"
    ),
    'columns_of_a_patch_before_its_rows': (
        "patch embedding: matches with a patch's values in the order columns, rows, channels"
    ),
    'patches_column_by_column': 'patch embedding: matches with the patches column by column instead of row by row',
    'scale_of_releases_before_0_6_7': 'block 0 attention: matches with the scale 24**-0.5 (dim) instead of 6**-0.5',
    'class_token_last': 'block 0 attention: matches with the class token last instead of first',
    'pooled_by_the_mean': 'pooled features: matches if pooled by the mean of all tokens instead of the first token',
    'reattention_transposed': (
        "block 0 attention: reattn_weights: not the source's, at most … apart; matches with reattn_weights transposed"
    ),
    'reattention_normalised_over_keys': (
        'block 0 attention: matches with re-attention normalised over keys instead of heads'
    ),
    'class_token_takes_the_last_position': f'{POSITIONS} if the class token takes the last position',
    'class_token_without_position': f'{POSITIONS} if the class token gets no position',
    'pooled_by_the_class_token': (
        'pooled features: matches if pooled by the class token instead of the mean of all tokens'
    ),
    'pooled_by_the_first_token': (
        'pooled features: matches if pooled by the first token instead of the mean of all tokens'
    ),
    'norm_before_pooling': (
        'pooled features: matches with the LayerNorm mlp_head.0 before pooling instead of in the head'
    ),
    'norm_after_pooling': (
        'pooled features: matches without the LayerNorm before pooling (it is in the head, or nowhere)'
    ),
    'sincos_axes_swapped': 'sincos table: matches with the axes of the sincos table swapped (y before x)',
    # No processor's table is exact: PyTorch's own may be as far away from the port's as this, so it counts as right.
    'sincos_steps_in_float64': None,
}

MORE: dict[tuple[str, str], tuple[Slip, str]] = {}


def named(cause: str, *configurations: Configuration) -> Callable[[Slip], Slip]:
    """Registers a slip that only needs telling from the others, and what `verify` says of it."""

    def register(function: Slip) -> Slip:
        for configuration in configurations or (DEEP, SIMPLE):
            MORE[configuration.architecture, function.__name__] = function, cause
            CASES[configuration.architecture, function.__name__] = configuration
        return function

    return register


def submodules(port: Port, path: str, function: Callable[..., Any]) -> None:
    """`function(call, x, keywords, module)` for every call of the submodule at a path."""

    def interceptor(call: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        if ('/'.join(context.module.path), context.method_name) == (path, '__call__'):
            return function(call, arguments[0], keywords, context.module)
        return call(*arguments, **keywords)

    port.interceptors.append(interceptor)


@named(f'block 0 feed-forward: matches {EPSILON} and {TANH}')
def defaults_of_flax_in_the_feed_forward(port: Port) -> None:
    port.substitute_gelu(nn.gelu)
    norm = nn.LayerNorm(use_fast_variance=False)
    submodules(
        port,
        'transformer/layers_0_1/net_0',
        lambda call, x, keywords, module: norm.apply({'params': module.variables['params']}, x),
    )


@named('block 0 feed-forward: matches with the sigmoid approximation of GELU instead of erf')
def sigmoid_gelu(port: Port) -> None:
    port.substitute_gelu(lambda x: x * nn.sigmoid(1.702 * x))


@named('patch embedding: matches with a LayerNorm epsilon of 1e-12 instead of 1e-05')
def epsilon_of_bert(port: Port) -> None:
    layer_norm = nn.LayerNorm(epsilon=1e-12, use_fast_variance=False)
    port.substitute('layer_norm', lambda self: layer_norm.clone(), flax_vit.layers.Layer)


@named("block 0 feed-forward: net.1.bias: not the source's, at most … apart; matches without net.1.bias")
def bias_missing(port: Port) -> None:
    port.change('layers_0_1/net_1/bias', jnp.zeros_like)


@named(
    "patch embedding: to_patch_embedding.1. … 4 more: not the source's, at most … apart; "
    'matches with parameters rounded to bfloat16 (param_dtype?)'
)
def parameters_rounded(port: Port) -> None:
    port.change('', lambda parameter: parameter.astype(jnp.bfloat16).astype(parameter.dtype))


@named("block 0 attention: norm.weight: not the source's, at most … apart; the source's times 1.25")
def scale_of_a_norm_grown(port: Port) -> None:
    port.change('layers_0_0/norm/scale', lambda scale: 1.25 * scale)


@named('patch embedding: matches without the LayerNorm to_patch_embedding.3')
def norm_missing(port: Port) -> None:
    submodules(port, 'to_patch_embedding_3', lambda call, x, keywords, module: x)


@named('block 0 attention: matches with the scale … (dim) instead of 6**-0.5')
def scaled_by_dim(port: Port) -> None:
    factor = (port.model.dim_head / port.model.dim) ** 0.5
    submodules(
        port,
        'transformer/layers_0_0/to_qkv',
        lambda call, x, keywords, module: call(x).at[..., : module.features // 3].multiply(factor),
    )


@named('block 0 attention: matches with the softmax over queries instead of keys', SIMPLE)
def softmax_over_queries(port: Port) -> None:
    port.substitute_softmax(lambda x: nn.softmax(x, axis=-2))


@named('block 0 attention: matches without re-attention', DEEP)
def reattention_missing(port: Port) -> None:
    submodules(port, 'transformer/layers_0_0/reattn_norm_1', lambda call, x, keywords, module: x)


@named('block 0 attention: matches without the LayerNorm reattn_norm.1', DEEP)
def reattention_not_normalised(port: Port) -> None:
    def mixed(call: Any, attn: Any, keywords: Any, module: Any) -> Any:
        return jnp.einsum('bhij,hg->bgij', attn, keywords['mix'])

    submodules(port, 'transformer/layers_0_0/reattn_norm_1', mixed)


@named('block 0 feed-forward: matches without the residual connection before it')
def residual_missing(port: Port) -> None:
    attended: list[Any] = []

    def keep(call: Any, x: Any, keywords: Any, module: Any) -> Any:
        attended.append(call(x, **keywords))
        return attended[-1]

    submodules(port, 'transformer/layers_0_0', keep)
    submodules(port, 'transformer/layers_0_1', lambda call, x, keywords, module: call(attended.pop(), **keywords))


@named('pooled features: matches if pooled by the mean of all tokens but the first instead of the mean', DEEP)
def pooled_without_the_class_token(port: Port) -> None:
    transformed: list[Any] = []

    def keep(call: Any, x: Any, keywords: Any, module: Any) -> Any:
        transformed.append(call(x, **keywords))
        return transformed[-1]

    submodules(port, 'transformer', keep)
    submodules(port, 'to_latent', lambda call, x, keywords, module: call(transformed.pop()[:, 1:].mean(axis=1)))


@named('block 0 attention: matches with the axes of the sincos table swapped (y before x)', SIMPLE)
def sincos_axes_swapped_in_the_model(port: Port) -> None:
    swap_table(port, lambda table: np.roll(table, table.shape[1] // 2, axis=1))


@named('block 0 attention: matches without positions', SIMPLE)
def sincos_table_missing(port: Port) -> None:
    swap_table(port, np.zeros_like)


def swap_table(port: Port, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """The port alone has another table; the reference keeps the right one."""

    def swapped(call: Any, x: Any, keywords: Any, module: Any) -> Any:
        table = port.model.pos_embedding()
        return call(x + (function(table) - table.astype(np.float64)), **keywords)

    submodules(port, 'transformer', swapped)


@named('block 0 attention: matches with the register tokens first instead of last', SIMPLE_WITH_REGISTERS)
def registers_first(port: Port) -> None:
    port.intercept('transformer', lambda call, x, keywords: call(jnp.roll(x, 5, axis=1), **keywords))


@named(
    'pooled features: matches if pooled by the mean of all tokens instead of the mean of the patches',
    SIMPLE_WITH_REGISTERS,
)
def registers_pooled(port: Port) -> None:
    def mean(call: Any, x: Any, keywords: Any) -> Any:
        x = call(x, **keywords)
        return jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)

    port.intercept('transformer', mean)


@named('block 0 attention: matches without the normalisation of queries and keys', SIMPLE_WITH_QK_NORM)
def queries_and_keys_not_normalised(port: Port) -> None:
    normalised(port, lambda x, gamma: x)


@named("block 0 attention: matches without gamma's factor 6**0.5 (dim_head) in queries and keys", SIMPLE_WITH_QK_NORM)
def gamma_without_its_factor(port: Port) -> None:
    normalised(port, lambda x, gamma: x / jnp.linalg.norm(x, axis=-1, keepdims=True) * gamma)


@named(
    "block 0 attention: matches with an epsilon of 1e-06 (flax's default) in the normalisation of queries and keys",
    SIMPLE_WITH_QK_NORM,
)
def epsilon_of_flax_in_queries_and_keys(port: Port) -> None:
    normalised(port, lambda x, gamma: nn.RMSNorm(use_scale=False).apply({}, x) * gamma)


@named(
    'block 0 attention: matches with the scale 6**-0.5 (dim_head), although queries and keys are normalised',
    SIMPLE_WITH_QK_NORM,
)
def normalised_queries_scaled(port: Port) -> None:
    port.intercept('q_norm', lambda call, x, keywords: call(x) / 6**0.5)


def normalised(port: Port, function: Callable[[Any, Any], Any]) -> None:
    """The port normalises queries and keys so."""

    def wrong(call: Any, x: Any, keywords: Any, module: Any) -> Any:
        return function(x, module.variables['params']['gamma'])

    for name in ('q_norm', 'k_norm'):
        submodules(port, f'transformer/layers_0_0/{name}', wrong)


@named('pooled features: matches if pooled by the mean of all tokens but the first instead of the first token', VIT)
def pooled_by_the_mean_of_the_patches(port: Port) -> None:
    def mean(call: Any, x: Any, keywords: Any, module: Any) -> Any:
        x = call(x, **keywords)
        return jnp.broadcast_to(x[:, 1:].mean(axis=1, keepdims=True), x.shape)

    submodules(port, 'transformer', mean)


@named("logits: none of the … known mistakes fits: it is the source's times 1.5")
def logits_grown(port: Port) -> None:
    deep = port.file is flax_vit.deep_vit
    submodules(port, 'mlp_head_1' if deep else 'linear_head', lambda call, x, keywords, module: 1.5 * call(x))


@named("block 0 feed-forward: none of the … known mistakes fits: it is … from the source's at most … times as large")
def something_unknown(port: Port) -> None:
    port.substitute_gelu(jnp.sin)


prepared, inspected = cache(converted), cache(convert.inspect)


def run(configuration: Configuration, slip: Slip, monkeypatch: pytest.MonkeyPatch, dtype: str = 'float64') -> Report:
    """What `verify` finds of a model with a slip in it. Whatever has no part in it is done once, or fast."""
    monkeypatch.setattr(test_slips, 'converted', prepared)
    monkeypatch.setattr(import_module('convert.proof.parity'), 'inspect', inspected)
    if dtype == 'float64':
        monkeypatch.setattr(jax, 'jit', partial(jax.jit, compiler_options=QUICK))
    port = Port.of(configuration, monkeypatch)
    slip(port)
    with ExitStack() as stack:
        for interceptor in port.interceptors:
            stack.enter_context(nn.intercept_methods(interceptor))
        variables = {'params': unflatten_dict(port.params, sep='/')}
        return verify(port.module, converted=(port.model, variables), images=port.images, dtype=dtype)


def assert_named(report: Report, cause: str) -> None:
    """One cause, and these words of it, in their order."""
    assert not report.right
    (found,) = report.causes
    pieces, rest = cause.split(' … '), found
    assert rest.startswith(pieces[0]), found
    for piece in pieces:
        assert piece in rest, (found, piece)
        rest = rest.split(piece, 1)[1]


def test_every_slip_has_its_cause() -> None:
    assert {name for _, name in SLIPS} == NAMED.keys()


@pytest.mark.slow
@pytest.mark.parametrize(('architecture', 'name'), SLIPS, ids=map('-'.join, SLIPS))
def test_slip(architecture: str, name: str, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    report, cause = run(CASES[architecture, name], SLIPS[architecture, name], monkeypatch), NAMED[name]
    if cause is None:
        assert report.right
        assert report.causes == []
    else:
        assert_named(report, cause)


@pytest.mark.slow
@pytest.mark.parametrize(('architecture', 'name'), MORE, ids=map('-'.join, MORE))
def test_more(architecture: str, name: str, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    slip, cause = MORE[architecture, name]
    assert_named(run(CASES[architecture, name], slip, monkeypatch), cause)


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['DeepViT', 'SimpleViT'])
@pytest.mark.parametrize(('mantissa_bits', 'name'), [(10, 'TF32 or float16'), (7, 'bfloat16')])
def test_products_of_fewer_bits(
    architecture: str, mantissa_bits: int, name: str, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """Float64 is right, float32 is not: what a GPU or TPU does to matrix products unless it is told not to."""

    def einsum(equation: str, x: jax.Array, y: jax.Array, **keywords: Any) -> jax.Array:
        if x.dtype == jnp.float32:
            x, y = (jax.lax.reduce_precision(each, 8, mantissa_bits) for each in (x, y))
        return jnp.einsum(equation, x, y, **keywords)

    def slip(port: Port) -> None:
        port.substitute('jnp', SimpleNamespace(**{**vars(jnp), 'einsum': einsum}), flax_vit.products)
        port.images -= 1000

    report = run(MODELS[architecture], slip, monkeypatch, 'float32')
    assert_named(report, f"patch embedding: matches with matrix products in {name} (set precision='highest')")


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['DeepViT', 'SimpleViT'])
@pytest.mark.parametrize('mean', [10, 100])
def test_fast_variance_in_float32_only(
    architecture: str, mean: int, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """The images' mean in deviations: float64 bears it where float32 does not."""

    def slip(port: Port) -> None:
        SLIPS[architecture, 'fast_variance'](port)
        port.images -= 1000 - mean

    report = run(MODELS[architecture], slip, monkeypatch, 'float32')
    if mean == 10:
        assert report.rows[0].exact <= report.rows[0].limit
    assert_named(report, f'patch embedding: … {FAST}')


@pytest.mark.parametrize('configuration', [DEEP, SIMPLE, VIT, VIT_MEAN], ids=['DeepViT', 'SimpleViT', 'ViT', 'mean'])
def test_no_cause_where_all_is_right(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    report = run(configuration, lambda port: None, monkeypatch)
    assert report.right
    assert report.causes == []


@pytest.mark.parametrize('part', ['to_patch_embedding.3', 'transformer.layers.0.1'])
def test_noise_of_bfloat16s_size_is_not_called_bfloat16(part: str, float64: None) -> None:
    """Products in bfloat16 repeat in numpy: an error of their size that they do not explain is none of theirs."""
    module, images = pytorch(SIMPLE), random_images(SIMPLE, batch=1)
    model = convert.inspect(module).model
    outputs = pytorch_outputs(module, channels_first(images))
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    truth = {name: outputs[name] for name in labels(model)}
    kind: Any = architecture_of(model).way
    way = kind.for_part(model, tensors, part)
    expected = truth[part][0]
    inputs = ways.part_inputs(way, images[0], {name: output[0] for name, output in truth.items()}, part)
    coarse = next(each for each in mistakes.rounding_mistakes('float32') if 'products in bfloat16' in each.words)
    rounding = size(coarse.applied(way).compute(part, inputs) - expected)
    noise = rounding * np.random.default_rng(0).standard_normal(expected.shape)
    (said,) = causes.causes(model, tensors, images, truth, part, 0, expected + noise, dtype='float32')
    assert said.startswith('none of the ')


def assert_parts_right(
    model: nn.Module, tensors: Mapping[str, np.ndarray], image: np.ndarray, outputs: Mapping[str, np.ndarray]
) -> None:
    truth = {part: outputs[part][0] for part in labels(model)}
    kind: Any = architecture_of(model).way
    for part, expected in truth.items():
        way = kind.for_part(model, tensors, part)
        found = way.compute(part, ways.part_inputs(way, image, truth, part))
        assert causes.error(found, expected) <= 1e-12, part


@pytest.mark.parametrize('name', [name for name in CONFIGURATIONS if not name.endswith(('wide', 'layers'))])
def test_parts_are_vit_pytorchs(name: str, float64: None) -> None:
    configuration = CONFIGURATIONS[name]
    module, images = pytorch(configuration), random_images(configuration, batch=1)
    model = convert.inspect(module, **configuration.told).model
    outputs = pytorch_outputs(module, channels_first(images))
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert_parts_right(model, tensors, images[0], outputs)


@pytest.mark.parametrize(
    ('norm_after_mean', 'patch_norm', 'num_classes'), [(True, True, 3), (True, False, 3), (False, True, 0)]
)
def test_parts_of_older_releases_and_without_head(
    norm_after_mean: bool, patch_norm: bool, num_classes: int, float64: None
) -> None:
    fields: dict[str, Any] = {'image_size': (4, 6), 'patch_size': 2, 'heads': 3}
    model = SimpleViT(
        **fields, num_classes=num_classes, dim=8, depth=1, mlp_dim=5, dim_head=4, patch_norm=patch_norm,
        norm_after_mean=norm_after_mean, param_dtype=jnp.float64,
    )  # fmt: skip
    images = np.random.default_rng(0).standard_normal((1, 4, 6, 3))
    variables = model.init(jax.random.key(0), images)
    source = params.to_torch(model, variables)
    inspection = convert.inspect(source, **fields, num_classes=num_classes)
    assert inspection.model.norm_after_mean == norm_after_mean
    outputs = TorchSide(inspection, source).outputs('float64', images, list(labels(model)))
    assert_parts_right(model, source, images[0], outputs)


@pytest.mark.parametrize(
    'configuration',
    [DEEP, SIMPLE, SIMPLE_WITH_REGISTERS, SIMPLE_WITH_QK_NORM, VIT, VIT_MEAN],
    ids=['DeepViT', 'SimpleViT', 'registers', 'qk-norm', 'ViT', 'mean'],
)
def test_mistakes_differ(configuration: Configuration, float64: None) -> None:
    """No two mistakes give the same output, so that whatever is named is named rightly."""
    module, images = pytorch(configuration), random_images(configuration, batch=1)
    model = convert.inspect(module, **configuration.told).model
    outputs = pytorch_outputs(module, channels_first(images))
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    truth = {part: outputs[part][0] for part in labels(model)}
    kind: Any = architecture_of(model).way
    for part in truth:
        way = kind.for_part(model, tensors, part)
        inputs = ways.part_inputs(way, images[0], truth, part)
        results = {'PyTorch': way.compute(part, inputs)}
        for mistake in mistakes.mistakes(way, part, len(truth[part])):
            result = mistake.applied(way).compute(part, inputs)
            same = [words for words, other in results.items() if causes.error(result, other) <= causes.FITS]
            assert same == [], (part, mistake.words)
            results[mistake.words] = result


def test_tf32_keeps_ten_bits() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = np.asarray(jax.lax.reduce_precision(jnp.asarray(x), 8, 10))
    np.testing.assert_array_equal(ways.to_tf32(x), expected)
    np.testing.assert_array_equal(ways.ROUNDINGS['bfloat16'](x), x.astype(ml_dtypes.bfloat16))


def test_sincos_is_the_table() -> None:
    model = flax_vit.SimpleViT(image_size=(5, 7), patch_size=1, num_classes=1, dim=24, depth=1, heads=1, mlp_dim=1)
    assert np.abs(simple_vit.exact_table(model) - model.pos_embedding()).max() <= 7 * 2.0**-23


def test_table_in_the_docs_has_every_slip() -> None:
    """`python -m parity_tests.proof.slips_table` writes it."""
    page = (Path(__file__).parents[2] / 'docs' / 'slips.md').read_text(encoding='utf-8')
    slips = dict.fromkeys(name for _, name in [*SLIPS, *MORE, *DROPOUT_SLIPS])
    rows = ['slip', 'none', *(name.replace('_', ' ') for name in slips)]
    assert re.findall(r'^\| (.*?) \|', page, re.MULTILINE) == rows


def test_the_docs_count_the_slips() -> None:
    page = (Path(__file__).parents[2] / 'docs' / 'testing.md').read_text(encoding='utf-8')
    assert f'[{len({name for _, name in [*SLIPS, *MORE, *DROPOUT_SLIPS]})} known mistakes](slips.md)' in page
