"""attention='fused': on NVIDIA GPUs cuDNN's attention, everywhere else, and where maps are asked for, the plain one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_vit
from flax_vit import SimpleViT, ViT
from flax_vit.layers import by_cudnn, weigh

SIZES: dict[str, Any] = {
    'image_size': 16, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 2, 'heads': 2, 'dim_head': 8, 'mlp_dim': 9,
}  # fmt: skip
both_models = pytest.mark.parametrize('model_class', [SimpleViT, ViT])
CALL, BACKWARD = '@__cudnn$fmhaSoftmax(', '@__cudnn$fmhaSoftmaxBackward('


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed: it is asked for its version when a program is traced, and for more when one runs."""
    monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91900)


def program(model: Any, platform: str = 'cuda', *, gradient: bool = False, **options: Any) -> str:
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    rngs = {'dropout': jax.random.key(1)}

    def run(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, rngs=rngs, **options)

    def total(variables: Any, images: Any) -> Any:
        return run(variables, images).astype(jnp.float32).sum()

    function: Any = jax.jit(jax.grad(total) if gradient else run)
    return str(function.trace(variables, images).lower(lowering_platforms=(platform,)).as_text())


@both_models
@pytest.mark.usefixtures('cudnn')
def test_cudnn_computes_attention_on_gpus_in_half_precision(model_class: Any) -> None:
    model = model_class(**SIZES, attention='fused', dtype='bfloat16')
    assert program(model).count(CALL) == 2
    assert program(model, gradient=True).count(BACKWARD) == 2
    for options in ({'remat': True}, {'scan_layers': True}, {'query_chunk_size': 5}):
        assert BACKWARD in program(model.clone(**options), gradient=True)
    assert CALL in program(model.clone(dtype='float16'))


@both_models
@pytest.mark.usefixtures('cudnn')
def test_where_attention_stays_plain(model_class: Any) -> None:
    model = model_class(**SIZES, attention='fused', dtype='bfloat16')
    for platform in ('cpu', 'tpu'):
        assert CALL not in program(model, platform)
    for fields in ({'dtype': 'float32'}, {'dim_head': 7}, {'attention': 'plain'}):
        assert CALL not in program(model.clone(**fields))
    assert CALL not in program(model, mutable=['intermediates'], capture_intermediates=True)
    with nn.intercept_methods(lambda function, arguments, keywords, _: function(*arguments, **keywords)):
        assert CALL not in program(model)


@pytest.mark.usefixtures('cudnn')
def test_dropout_of_the_maps_stays_plain() -> None:
    model = ViT(**SIZES, attention='fused', dtype='bfloat16', dropout=0.1)
    assert CALL in program(model)
    assert CALL not in program(model, train=True)


@both_models
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.usefixtures('cudnn')
def test_the_same_bits_where_it_is_plain(model_class: Any, dtype: str) -> None:
    model = model_class(**SIZES, dtype=dtype)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = model.init(jax.random.key(1), images)
    results = [
        jax.jit(jax.value_and_grad(lambda variables, model=each: model.apply(variables, images).sum()))(variables)
        for each in (model, model.clone(attention='fused'))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    maps = [
        flax_vit.features(each, variables, images, attention=True).attention
        for each in (model, model.clone(attention='fused'))
    ]
    jax.tree.map(np.testing.assert_array_equal, *maps)


@pytest.mark.parametrize(('queries', 'keys'), [(6, 6), (7, 7), (5, 8), (1, 3)])
def test_what_cudnn_is_asked_for_is_the_same(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    """XLA computes by the same call, and in float32: another scale, order of axes or number of tokens would show."""
    monkeypatch.setattr(jax.nn, 'dot_product_attention', partial(in_xla, jax.nn.dot_product_attention))
    q = jax.random.normal(jax.random.key(0), (2, 4, queries, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 4, keys, 8))
    plain = weigh(q, k, v, attend=lambda maps: maps, scale=0.3, precision='highest')
    epsilon = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(by_cudnn(q, k, v, scale=0.3), plain, rtol=0, atol=16 * epsilon)


def in_xla(attention: Any, *arguments: Any, implementation: str, **options: Any) -> Any:
    assert implementation == 'cudnn'
    return attention(*arguments, implementation='xla', **options)


def test_what_attention_may_be() -> None:
    with pytest.raises(ValueError, match="attention must be 'plain' or 'fused', not 'flash'"):
        ViT(**SIZES, attention='flash')
