"""The models as flax.nnx modules: the same numbers, whatever nnx does with them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

from flax_vit import DeepViT, SimpleViT, ViT, from_nnx, to_nnx
from parity_tests.support.pages import ROOT, blocks
from parity_tests.support.slow import slow_but

SIZES: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 1, 'heads': 2}
MODELS = [
    DeepViT(**SIZES, mlp_dim=8, dropout=0.5, emb_dropout=0.5),
    SimpleViT(**SIZES, mlp_dim=8),
    ViT(**SIZES, mlp_dim=8, dropout=0.5, emb_dropout=0.5),
]
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def same(one: Any, other: Any) -> bool:
    """Whether two trees have the same names, dtypes and bits."""
    alike = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    return all(jax.tree.leaves(alike))


@pytest.fixture(scope='module', params=MODELS, ids=lambda model: type(model).__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope='module')
def variables(model: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(1), IMAGES)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_there_and_back_and_the_same_logits(model: Any, variables: Any, dtype: str) -> None:
    variables = jax.tree.map(lambda array: array.astype(dtype), variables)
    module = to_nnx(model, variables)
    assert same(from_nnx(module), variables)
    logits = nnx.jit(lambda module, images: module(images))(module, IMAGES)
    assert np.array_equal(logits, jax.jit(model.apply)(variables, IMAGES))


def test_a_step_of_training_is_linens(model: Any, variables: Any) -> None:
    """The gradients bit for bit, and the parameters after the optimizer's step."""

    def loss(logits: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 2])).mean()

    gradients = jax.jit(jax.grad(lambda variables: loss(model.apply(variables, IMAGES))))(variables)
    transform = optax.adamw(1e-2)

    @jax.jit
    def linen_step(variables: Any, gradients: Any) -> Any:
        updates, _ = transform.update(gradients, transform.init(variables), variables)
        return optax.apply_updates(variables, updates)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> Any:
        gradients = nnx.grad(lambda module: loss(module(IMAGES)))(module)
        optimizer.update(module, gradients)
        return gradients

    module = to_nnx(model, variables)
    found = step(module, nnx.Optimizer(module, transform, wrt=nnx.Param))
    assert same({'params': nnx.to_pure_dict(found)}, gradients)
    stepped = from_nnx(module)
    assert not same(stepped, variables)
    for one, other in zip(*map(jax.tree.leaves, (stepped, linen_step(variables, gradients))), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)  # of steps of 1e-2: XLA fuses the two otherwise


def test_dropout_takes_keys_from_rngs() -> None:
    model = MODELS[0]
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)
    module = to_nnx(model, variables, nnx.Rngs(dropout=7))
    train = nnx.jit(lambda module: module(IMAGES, train=True))
    first, second = train(module), train(module)
    assert not np.array_equal(first, second)  # the stream moves on
    assert np.array_equal(first, train(to_nnx(model, variables, nnx.Rngs(dropout=7))))
    assert np.array_equal(module(IMAGES), to_nnx(model, variables)(IMAGES))  # and without training there is none


def test_train_and_eval(model: Any, variables: Any) -> None:
    """They say whether dropout acts, unless the call does."""
    module = to_nnx(model, variables, nnx.Rngs(dropout=7))
    call = nnx.jit(lambda module, **keywords: module(IMAGES, **keywords), static_argnames='train')
    evaluated = call(module)
    dropped = not np.array_equal(call(module, train=True), evaluated)
    assert dropped == (not isinstance(model, SimpleViT))
    module.train()
    assert np.array_equal(call(module), evaluated) != dropped
    assert np.allclose(module(images=IMAGES), evaluated, atol=1e-5) != dropped
    assert np.array_equal(call(module, train=False), evaluated)
    module.eval()
    assert np.array_equal(call(module), evaluated)
    assert same(from_nnx(module), variables)


def test_nnx_sees_parameters(model: Any, variables: Any) -> None:
    module = to_nnx(model, variables)
    assert same({'params': nnx.to_pure_dict(nnx.state(module, nnx.Param))}, variables)
    split: Any = nnx.split(module, nnx.Param, ...)
    graph, parameters, others = split
    assert not jax.tree.leaves(others)
    doubled = nnx.merge(graph, jax.tree.map(lambda array: 2 * array, parameters), others)
    assert same(from_nnx(doubled), jax.tree.map(lambda array: 2 * array, variables))


@pytest.mark.parametrize('mode', slow_but('false', ['true', 'false']))
def test_the_page_in_both_of_nnx_modes(mode: str, tmp_path: Path) -> None:
    """Modules as graphs, and as trees; which is the default depends on flax's version."""
    script = '\n'.join(text for _, text in blocks(ROOT / 'docs' / 'nnx.md', 'python'))
    script = script.replace("'examples/", f"'{ROOT}/examples/")
    settings = {'NNX_GRAPH_MODE': mode, 'NNX_GRAPH_UPDATES': mode, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', script]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.usefixtures('unchecked')
def test_what_is_none_of_ours(model: Any, variables: Any) -> None:
    with pytest.raises(ValueError, match=r"variables of a .*ViT are \{'params': …\}, not a dict of \["):
        to_nnx(model, variables['params'])
    with pytest.raises(ValueError, match='expected'):
        to_nnx(model.clone(mlp_dim=9), variables)
    with pytest.raises(ValueError, match=r'The model must be one of .*SimpleViT, ViT, not a Dense'):
        to_nnx(nn.Dense(3), variables)
    for module in (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.bridge.ToNNX(nn.Dense(3)), model):
        with pytest.raises(ValueError, match=r'from_nnx takes what to_nnx made of one of .*SimpleViT, ViT, not a '):
            from_nnx(module)  # type: ignore[arg-type]
