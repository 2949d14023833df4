"""The port computes what vit-pytorch computes: outputs, intermediates, gradients, in every precision."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vit_pytorch.simple_vit
from flax import linen as nn

import convert
from flax_vit import stack_layers, unstack_layers
from flax_vit.products import product
from flax_vit.simple_vit import posemb_sincos_2d
from parity_tests.support.reference import (
    CONFIGURATIONS,
    FLOAT64_BOUND,
    GRADIENT_BOUND,
    QUICK,
    ROUNDING_RATIO,
    Configuration,
    Masks,
    channels_first,
    check,
    converted,
    dropout_errors,
    gradient_errors,
    output_errors,
    port_outputs,
    pytorch,
    random_configuration,
    random_images,
    relative_error,
    rounding_error,
    to_numpy,
)
from parity_tests.support.slow import slow_but

ODD = {'deep-plain', 'deep-smaller-oblong', 'simple-oblong-patches', 'vit-oblong', 'vit-one-head-of-full-width'}
ODD |= {'registers-oblong', 'qk-norm-oblong'}
every_configuration = pytest.mark.parametrize('name', slow_but(ODD, CONFIGURATIONS))
both_models = pytest.mark.parametrize('name', ['deep-plain', 'simple-oblong-patches'])


@every_configuration
def test_outputs_and_intermediates_in_float64(name: str, float64: None) -> None:
    module, model, variables = converted(CONFIGURATIONS[name])
    errors = output_errors(module, model, variables, random_images(CONFIGURATIONS[name]))
    compared = {part for part, child in module.named_modules() if any(True for _ in child.parameters(recurse=False))}
    blocks = {part for part, _ in module.named_modules() if re.fullmatch(r'transformer\.layers\.\d+\.[01]', part)}
    assert len(blocks) == 2 * CONFIGURATIONS[name].fields['depth']
    assert compared | blocks | {''} <= errors.keys()
    check(errors, FLOAT64_BOUND)


@every_configuration
def test_gradients_in_float64(name: str, float64: None) -> None:
    module, model, variables = converted(CONFIGURATIONS[name])
    check(gradient_errors(module, model, variables, random_images(CONFIGURATIONS[name])), GRADIENT_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(('seed', 'vit'), [*((seed, False) for seed in range(8)), *((seed, True) for seed in range(3))])
def test_configurations_drawn_at_random(seed: int, vit: bool, float64: None) -> None:
    configuration = random_configuration(seed, vit=vit)
    module, model, variables = converted(configuration, seed=seed)
    images = random_images(configuration, seed)
    check(output_errors(module, model, variables, images), FLOAT64_BOUND)
    check(gradient_errors(module, model, variables, images), GRADIENT_BOUND)


def check_rounding(configuration: Configuration, dtype: torch.dtype, **options: Any) -> None:
    assert rounding_error(configuration, dtype, **options) <= ROUNDING_RATIO


@every_configuration
def test_rounding_in_float32(name: str) -> None:
    check_rounding(CONFIGURATIONS[name], torch.float32)


@pytest.mark.parametrize('kind', ['plain', 'wide', 'twelve-layers'])
@pytest.mark.parametrize('model', ['deep', 'simple'])
def test_rounding_in_bfloat16(model: str, kind: str) -> None:
    check_rounding(CONFIGURATIONS[f'{model}-{kind}'], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['DeepViT', 'SimpleViT'])
@pytest.mark.parametrize('batch', [1, 2])
def test_rounding_in_bfloat16_at_a_usual_size(architecture: str, batch: int) -> None:
    """A CPU's units do not take every product: XLA must have something to run the others with."""
    fields = {'image_size': 224, 'patch_size': 16, 'dim': 384, 'depth': 1, 'heads': 6, 'mlp_dim': 1536}
    configuration = Configuration(architecture, fields | {'num_classes': 1000}, (224, 224))
    assert rounding_error(configuration, torch.bfloat16, batch=batch) <= ROUNDING_RATIO


def test_bfloat16_products_of_what_is_transposed() -> None:
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        return product('bgh,bhn->bgn', jnp.broadcast_to(x.T, (1, 6, 6)), y, precision=None)

    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (6, 6)), jnp.bfloat16)
    y = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (1, 6, 40_000)), jnp.bfloat16)
    expected = np.asarray(x, float).T @ np.asarray(y, float)  # whole numbers, all below 2^8: exact
    np.testing.assert_array_equal(np.asarray(jax.jit(multiply)(x, y), float), expected)


@pytest.mark.slow
@both_models
def test_rounding_in_bfloat16_at_depth_32(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    check_rounding(replace(configuration, fields={**configuration.fields, 'depth': 32}), torch.bfloat16)


@both_models
def test_rounding_in_float16(name: str) -> None:
    check_rounding(CONFIGURATIONS[name], torch.float16)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the models compute on GPU and TPU, computed here."""
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *arguments, default, **_: default(*arguments))
    jax.clear_caches()  # programs traced before
    yield
    jax.clear_caches()


@both_models
def test_elsewhere_in_float64(name: str, elsewhere: None, float64: None) -> None:
    module, model, variables = converted(CONFIGURATIONS[name])
    images = random_images(CONFIGURATIONS[name])
    check(output_errors(module, model, variables, images), FLOAT64_BOUND)
    check(gradient_errors(module, model, variables, images), GRADIENT_BOUND)


@pytest.mark.slow
@both_models
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_rounding_elsewhere(name: str, dtype: torch.dtype, elsewhere: None) -> None:
    check_rounding(CONFIGURATIONS[name], dtype)


@both_models
def test_jit_vmap_and_grad_compose(name: str, float64: None) -> None:
    configuration = CONFIGURATIONS[name]
    module, model, variables = converted(configuration)
    images = jnp.asarray(random_images(configuration, batch=3))
    truth = to_numpy(module(channels_first(np.asarray(images))))

    def logits(variables: Any, image: Any) -> jax.Array:
        return model.apply(variables, image[None])[0]

    def loss(variables: Any, image: Any) -> jax.Array:
        return jnp.sin(logits(variables, image)).sum()

    assert relative_error(jax.jit(model.apply)(variables, images), truth) <= FLOAT64_BOUND
    assert relative_error(jax.jit(jax.vmap(logits, (None, 0)))(variables, images), truth) <= FLOAT64_BOUND
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)), compiler_options=QUICK)(variables, images)
    torch.sin(module(channels_first(np.asarray(images)))).sum().backward()
    summed = convert.to_torch(model, jax.tree.map(lambda gradient: gradient.sum(0), each))
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert relative_error(summed[parameter_name], to_numpy(parameter.grad)) <= GRADIENT_BOUND, parameter_name


BITS = {
    torch.float64: (torch.int64, np.int64),
    torch.float32: (torch.int32, np.int32),
    torch.bfloat16: (torch.int16, np.int16),
    torch.float16: (torch.int16, np.int16),
}


@pytest.mark.parametrize('dtype', BITS, ids=str)
@both_models
def test_weights_go_there_and_back_bit_for_bit(name: str, dtype: torch.dtype, float64: None) -> None:
    module = pytorch(CONFIGURATIONS[name], dtype)
    integers, numpy_integers = BITS[dtype]
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():  # any bits: subnormals, negative zeros, infinities, the payloads of nan
        info = torch.iinfo(integers)
        noise = torch.randint(info.min, info.max, parameter.shape, generator=generator, dtype=integers)
        parameter.data = noise.view(dtype)
    back = convert.to_torch(*convert.from_torch(module))
    assert back.keys() == module.state_dict().keys()
    for parameter_name, parameter in module.state_dict().items():
        assert back[parameter_name].dtype == to_numpy(parameter).dtype
        np.testing.assert_array_equal(back[parameter_name].view(numpy_integers), parameter.view(integers).numpy())


def dropping(name: str, **rates: float) -> Configuration:
    """A model of the table with dropout."""
    configuration = CONFIGURATIONS[name]
    return replace(configuration, fields={**configuration.fields, **rates})


@pytest.mark.parametrize('name', ['deep-plain', 'deep-mean', 'vit-plain', 'vit-one-head-of-full-width'])
def test_dropout_with_the_same_masks(name: str, float64: None) -> None:
    configuration = dropping(name, dropout=0.3, emb_dropout=0.2)
    module, model, variables = converted(configuration)
    images = random_images(configuration)
    at_rest = to_numpy(module(channels_first(images)))
    errors = dropout_errors(module, model, variables, images)
    check(errors, FLOAT64_BOUND)
    with nn.intercept_methods(Masks().intercept):  # and they are masks that matter
        assert relative_error(port_outputs(model, variables, images, train=True)[''], at_rest) > 0.1


@pytest.mark.parametrize('rate', ['dropout', 'emb_dropout'])
def test_dropout_is_for_training(rate: str) -> None:
    configuration = dropping('deep-plain', **{rate: 0.3})
    _, model, variables = converted(configuration, torch.float32)
    images = jnp.asarray(random_images(configuration), jnp.float32)
    apply = jax.jit(model.apply, static_argnames='train', compiler_options=QUICK)
    at_rest = apply(variables, images)

    def trained(seed: int) -> jax.Array:
        return apply(variables, images, train=True, rngs={'dropout': jax.random.key(seed)})

    assert relative_error(trained(0), at_rest) > 0.01
    assert relative_error(trained(0), trained(1)) > 0.01
    np.testing.assert_array_equal(trained(0), trained(0))
    np.testing.assert_array_equal(apply(variables, images, rngs={'dropout': jax.random.key(0)}), at_rest)
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
        apply(variables, images, train=True)


def test_simple_vit_is_the_same_in_training() -> None:
    configuration = CONFIGURATIONS['simple-plain']
    _, model, variables = converted(configuration, torch.float32)
    images = jnp.asarray(random_images(configuration), jnp.float32)
    apply = jax.jit(model.apply, static_argnames='train', compiler_options=QUICK)
    np.testing.assert_array_equal(apply(variables, images, train=True), apply(variables, images))


@pytest.mark.parametrize(('height', 'width', 'dim'), [(1, 1, 8), (3, 5, 24), (14, 14, 192), (7, 64, 1024), (64, 2, 12)])
def test_sincos_tables(height: int, width: int, dim: int) -> None:
    """As near as float32 lets them be, entry by entry.

    Both compute position · 1 / 10000^e in float32, from the same e: a division that IEEE 754 rounds. Let
    u = 2⁻²³, the unit in the last place relative to a number, at its largest. The powers may be 1 unit apart, u
    relative; the two roundings of 1 / power and those of position · omega, half a unit each in each framework, add
    u and u. So the angles are at most 3 u · angle apart, and so are their sines, the slope of which is at most 1.
    The sines themselves, at most 1, may be another unit apart: u / 2 below 1, and less below one half.
    """
    port = posemb_sincos_2d(height, width, dim)
    theirs = to_numpy(vit_pytorch.simple_vit.posemb_sincos_2d(height, width, dim))
    assert port.dtype == theirs.dtype == np.float32
    assert port.shape == theirs.shape
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:height, :width])
    omega = 10_000.0 ** -np.linspace(0, 1, dim // 4)
    angles = np.concatenate([x * omega, x * omega, y * omega, y * omega], axis=1)
    bound = (3 * angles + 0.5) * 2.0**-23
    assert (np.abs(port.astype(np.float64) - theirs) <= bound).all()


def test_sincos_table_takes_its_steps_in_float32() -> None:
    theirs = to_numpy(vit_pytorch.simple_vit.posemb_sincos_2d(14, 14, 192))
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:14, :14])
    omega = 10_000.0 ** -np.linspace(0, 1, 48)
    exact = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    assert np.mean(posemb_sincos_2d(14, 14, 192) == theirs) > 0.8  # the same bits
    assert np.mean(exact.astype(np.float32) == theirs) < 0.7


OPTIONS: dict[str, dict[str, Any]] = {
    'chunked': {'query_chunk_size': 2},
    'rematerialised': {'remat': True},
    'scanned': {'scan_layers': True},
    'all': {'query_chunk_size': 3, 'remat': True, 'scan_layers': True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'option'),
    [(name, option) for name in ('deep-mean', 'simple-plain', 'vit-oblong') for option in OPTIONS]
    + [('deep-smaller-oblong', 'all'), ('simple-oblong-patches', 'all')],
)
def test_options_change_no_number(name: str, option: str, float64: None) -> None:
    """The options say how a model is computed; converted weights run with every one of them."""
    configuration = CONFIGURATIONS[name]
    module, model, variables = converted(configuration)
    plain = {'params': {**variables['params']}}
    model = model.clone(**OPTIONS[option])
    variables = stack_layers(variables) if model.scan_layers else variables
    images = random_images(configuration)
    errors = output_errors(module, model, variables, images)
    blocks = {f'transformer.layers.{block}.{part}' for block in range(model.depth) for part in (0, 1)}
    assert blocks | {'', 'transformer'} <= errors.keys()
    check(errors, FLOAT64_BOUND)
    check(gradient_errors(module, model, variables, images), GRADIENT_BOUND)
    if model.scan_layers:
        back = unstack_layers(variables)
        jax.tree.map(np.testing.assert_array_equal, back, plain)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', ['deep-wide', 'simple-wide'])
def test_rounding_with_every_option(name: str, dtype: torch.dtype) -> None:
    check_rounding(CONFIGURATIONS[name], dtype, query_chunk_size=5, remat=True, scan_layers=True)
