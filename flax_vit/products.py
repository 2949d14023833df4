"""Matrix products. On CPUs those in bfloat16 use the processor's own units, in the backward pass, too."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import BFloat16, Float


def product(
    equation: str, x: Float[Array, '...'], y: Float[Array, '...'], *, precision: PrecisionLike
) -> Float[Array, '...']:
    """`jnp.einsum` of two arrays of one dtype, in that dtype. An ellipsis is the leading axes of `x` but for one."""
    if x.dtype != jnp.bfloat16:
        return jnp.einsum(equation, x, y, precision=precision)
    # Inside of shard_map JAX keeps account of what differs between devices, and of our own operation it can't.
    multiply = bfloat16_product if jax.sharding.get_abstract_mesh().manual_axes else bfloat16_product_p.bind
    return multiply(x, y, equation=equation.replace('...', ascii_uppercase[: x.ndim - 1]), precision=precision)


def bfloat16_product(
    x: BFloat16[Array, '...'], y: BFloat16[Array, '...'], *, equation: str, precision: PrecisionLike
) -> BFloat16[Array, '...']:
    """`jnp.einsum` of two arrays, without an ellipsis.

    A CPU's units for bfloat16 add up in float32. XLA uses them only if the result is asked for in float32 and rounded
    afterwards, only if the axes that are summed over are the first factor's last, and only if both factors and the
    result lie in memory in their axes' order; else it computes in float32, which takes 4 to 6 times as long, or, where
    it had decided for the units before it moved an axis, fails. Elsewhere XLA rounds within the product.
    """

    def plain(x: Array, y: Array) -> Array:
        return jnp.einsum(equation, x, y, precision=precision)

    def by_units(x: Array, y: Array) -> Array:
        first, second, result = axes(equation)
        batch = [axis for axis in result if axis in first and axis in second]
        summed = [axis for axis in first if axis not in result]
        rows, columns = ([axis for axis in result if axis in one and axis not in batch] for one in (first, second))
        if [*map(result.index, columns)] < [*map(result.index, rows)]:  # or the result would have to be moved
            x, y, first, second, rows, columns = y, x, second, first, columns, rows
        before = second.index(summed[0]) < second.index(columns[0])  # either is fine
        orders = [*batch, *rows, *summed], [*batch, *(summed + columns if before else columns + summed)]
        x, y = moved(x, first, orders[0]), moved(y, second, orders[1])
        x, y = jax.lax.optimization_barrier((x, y))  # no transposition is drawn into the product; costs nothing
        places: Any = tuple([[order.index(axis) for axis in names] for order in orders] for names in (summed, batch))
        wide = jax.lax.dot_general(x, y, places, precision=precision, preferred_element_type=jnp.float32)
        order = [*batch, *rows, *columns]
        if order != [*result]:
            wide = in_memory(wide)
        return jnp.transpose(wide.astype(jnp.bfloat16), [order.index(axis) for axis in result])

    return jax.lax.platform_dependent(x, y, cpu=by_units, default=plain)


def moved(x: Array, names: str, order: Sequence[str]) -> Array:
    """With its axes in this order, in memory, too."""
    if [*names] == order:
        return x
    return in_memory(jnp.transpose(x, [names.index(axis) for axis in order]))


def in_memory(x: Array) -> Array:
    """As it is, in the order of its axes: XLA would rather read it in another, and a single axis has but one."""
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def axes(equation: str) -> list[str]:
    """The axes of the two factors and of the result."""
    return equation.replace('->', ',').split(',')


# As an operation of JAX's own, because einsum's backward pass would be products in float32. Its rules are those of any
# product: linear in each factor, the gradient by one is the product of the other with the result's gradient.
bfloat16_product_p = Primitive('bfloat16_product')
bfloat16_product_p.def_impl(jax.jit(bfloat16_product, static_argnames=('equation', 'precision')))
mlir.register_lowering(bfloat16_product_p, mlir.lower_fun(bfloat16_product, multiple_results=False))


@bfloat16_product_p.def_abstract_eval
def shape_of_product(x: Any, y: Any, *, equation: str, **_: Any) -> ShapedArray:
    first, second, result = axes(equation)
    sizes = dict(zip(first + second, x.shape + y.shape, strict=True))
    return ShapedArray(tuple(sizes[axis] for axis in result), x.dtype)


def gradient_by_first(gradient: Array, _: Any, y: Array, *, equation: str, **precision: Any) -> Array:
    first, second, result = axes(equation)
    return bfloat16_product_p.bind(gradient, y, equation=f'{result},{second}->{first}', **precision)


def gradient_by_second(gradient: Array, x: Array, _: Any, *, equation: str, **precision: Any) -> Array:
    first, second, result = axes(equation)
    return bfloat16_product_p.bind(x, gradient, equation=f'{first},{result}->{second}', **precision)


ad.defbilinear(bfloat16_product_p, gradient_by_first, gradient_by_second)


def vmapped(factors: Any, mapped: Any, *, equation: str, **precision: Any) -> tuple[Array, int]:
    """One axis more: `mapped` says where in each of the factors, None where it isn't; first in the result."""
    new = next(axis for axis in ascii_uppercase if axis not in equation)
    *names, result = axes(equation)
    first, second = (
        one if place is None else one[:place] + new + one[place:] for one, place in zip(names, mapped, strict=True)
    )
    return bfloat16_product_p.bind(*factors, equation=f'{first},{second}->{new}{result}', **precision), 0


batching.primitive_batchers[bfloat16_product_p] = vmapped
