"""Products in bfloat16 have rules of their own for gradients, directional derivatives and vmap: einsum's results."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from flax_vit import DeepViT, SimpleViT, ViT
from flax_vit.products import product

SIZES = dict(zip('btiohjdgn', (2, 3, 4, 5, 3, 6, 2, 3, 4), strict=True))
EQUATIONS = ('bti,io->bto', 'bhid,bhjd->bhij', 'bhij,bhjd->bhid', 'bgh,bhij->bgij', 'io,bti->bot')


def integers(names: str, seed: int) -> jax.Array:
    """Small ones: what they give in any order of summation has no more bits than a bfloat16 holds."""
    numbers = np.random.default_rng(seed).integers(-1, 2, [SIZES[name] for name in names])
    return jnp.asarray(numbers, jnp.bfloat16)


def factors(equation: str, seed: int = 0) -> list[jax.Array]:
    return [integers(names, seed + place) for place, names in enumerate(equation.split('->')[0].split(','))]


def both(equation: str) -> tuple[Any, Any]:
    """Ours and einsum's, of two arrays."""
    return partial(product, equation, precision=None), partial(jnp.einsum, equation)


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize('jit', [True, False])
@pytest.mark.parametrize('equation', EQUATIONS)
def test_derivatives_of_products_in_bfloat16(equation: str, jit: bool) -> None:
    arguments, tangents = factors(equation), factors(equation, seed=2)

    def derivatives(multiply: Any, arguments: Any, tangents: Any) -> Any:
        result, tangent = jax.jvp(multiply, arguments, tangents)
        _, backward = jax.vjp(multiply, *arguments)

        def pulled_back(*arguments: Any) -> Any:
            return jax.vjp(multiply, *arguments)[1](tangent)

        return result, tangent, backward(tangent), jax.jvp(pulled_back, arguments, tangents)

    with jax.disable_jit(not jit):
        ours, theirs = (jax.jit(partial(derivatives, each))(arguments, tangents) for each in both(equation))
    assert_same(ours, theirs)


@pytest.mark.parametrize('mapped', [(0, None), (None, 1), (1, 0)])
@pytest.mark.parametrize('equation', EQUATIONS)
def test_products_in_bfloat16_under_vmap(equation: str, mapped: tuple[Any, Any]) -> None:
    arguments = [
        each if place is None else jnp.stack([each, -each, 2 * each], place)
        for each, place in zip(factors(equation), mapped, strict=True)
    ]

    def total(multiply: Any, x: Any, y: Any) -> Any:
        return multiply(x, y).astype(jnp.float32).sum()

    for function in (lambda each: each, lambda each: jax.grad(partial(total, each), argnums=(0, 1))):
        ours, theirs = (jax.vmap(function(each), in_axes=mapped)(*arguments) for each in both(equation))
        assert_same(ours, theirs)
    nested = (jax.vmap(jax.vmap(each, in_axes=(None, 0)), in_axes=(0, None)) for each in both(equation))
    assert_same(*(each(*(jnp.stack([factor, -factor]) for factor in factors(equation))) for each in nested))


def test_products_in_bfloat16_inside_of_shard_map() -> None:
    """JAX adds up there what every device's images give a weight, if it knows that the result differs between them."""
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
    images, weights = factors('bti,io->bto')

    def total(weights: Any, images: Any) -> Any:
        result = product('...i,io->...o', images, weights, precision=None)
        assert jax.typeof(result) == jax.typeof(jnp.einsum('bti,io->bto', images, weights))
        return jax.lax.psum(result.sum(), 'data')

    gradient = jax.jit(jax.shard_map(jax.grad(total), mesh=mesh, in_specs=(P(), P('data')), out_specs=P()))
    assert_same(gradient(weights, images), jax.grad(lambda w: jnp.einsum('bti,io->bto', images, w).sum())(weights))


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_units_for_bfloat16_get_products_that_they_do(model_class: Any) -> None:
    """On CPUs, forward and backward: of two bfloat16 in float32, summed over the last axes of the first."""
    model = model_class(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=24, dtype=jnp.bfloat16
    )
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda variables, images: model.apply(variables, images).sum())
    program = jax.jit(gradient).lower(variables, images).as_text()
    found = re.findall(
        r'dot_general .*?(?:batching_dims = (\[.*?\]) x \[.*?\], )?contracting_dims = \[(.*?)\] x .*'
        r': \(tensor<([\dx]*)x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>',
        program,
    )
    assert len(found) == program.count('dot_general') >= 3 * 8 - 1  # of the images there is no gradient
    for _, summed, shape, *dtypes in found:
        assert dtypes == ['bf16', 'bf16', 'f32']
        last = shape.count('x')
        assert [int(axis) for axis in summed.split(',')] == list(range(last + 1))[-len(summed.split(',')) :]
