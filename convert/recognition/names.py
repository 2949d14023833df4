"""PyTorch names and shapes <-> the Flax tree: one bijection for every model, read off the Flax paths themselves."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.architectures.architecture import flax_axes
from convert.errors import ConversionError
from flax_vit.parameters import check_variables, variable_shapes
from flax_vit.stacking import is_stacked, one_by_one, stack_layers, unstack_layers

Path = tuple[str, ...]

WEIGHTS = {'kernel': 'weight', 'scale': 'weight'}
ALIGNMENT = 64  # bytes, of arrays that JAX on a CPU takes over
COLUMNS = 128  # of a matrix that are copied at a time
THREADS = min(4, os.cpu_count() or 1)  # that copy; the memory is soon the limit


@dataclass(frozen=True)
class Leaf:
    """How one parameter travels between the frameworks."""

    path: Path  # in the Flax variables: ('params', 'transformer', 'layers_3_1', 'net_4', 'kernel')
    name: str  # in vit-pytorch: 'transformer.layers.3.1.net.4.weight'
    axes: tuple[int, ...]  # PyTorch's axes in Flax's order
    batched: bool = False  # the layout has it with an axis more, 1, in front

    @property
    def place(self) -> str:
        """Where it is in Flax, for people: among the parameters, if nothing else is said."""
        return '/'.join(self.path).removeprefix('params/')

    @property
    def transform(self) -> str:
        if self.batched:
            return 'without the first axis'
        return 'as it is' if self.axes == tuple(sorted(self.axes)) else f'transpose {self.axes}'

    def to_flax(self, array: Any) -> Any:
        return array.transpose(self.axes)

    def to_torch(self, array: Any) -> Any:
        return array.transpose(np.argsort(self.axes))

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """PyTorch's shape of the parameter that has `shape` in Flax."""
        return tuple(shape[axis] for axis in np.argsort(self.axes))


def leaf(path: Path, dimensions: int) -> Leaf:
    """The rule for the Flax variable at `path`: its PyTorch name and the order of its axes.

    Linen names the submodules in a list by position, so `net_4` is PyTorch's `net.4`. A kernel is PyTorch's weight, of
    other axes, a norm's scale its weight; everything else has the same name and the same axes.
    """
    collection, *modules, last = path
    called = f'running_{last}' if collection == 'batch_stats' else WEIGHTS.get(last, last)
    return Leaf(path, torch_module_name([*modules, called]), flax_axes(last, dimensions))


def leaf_shapes(model: nn.Module) -> dict[Leaf, tuple[int, ...]]:
    """The rule of every variable of the model, and its shape in Flax."""
    return {leaf(path, len(shape.shape)): shape.shape for path, shape in variable_shapes(model).items()}


def torch_module_name(path: Sequence[str]) -> str:
    """PyTorch's name of the Flax submodule at `path`: ('transformer', 'layers_3_1') -> 'transformer.layers.3.1'."""
    return '.'.join(re.sub(r'_(?=\d)', '.', module) for module in path)


def to_flax(
    model: nn.Module,
    tensors: Mapping[str, np.ndarray],
    *,
    param_dtype: Any = None,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """The variables of `model` out of tensors with today's names; every tensor used once, every leaf filled once.

    One tensor at a time is copied out of `tensors`, which may be views of a mapped file. Raises ConversionError with
    every name that is missing (-), left over (+) or misshapen.
    """
    stacked, model = is_stacked(model), one_by_one(model)
    shapes = leaf_shapes(model)
    expected = {rule.name: rule.torch_shape(shape) for rule, shape in shapes.items()}
    problems = differences(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if problems:
        raise ConversionError(f'The tensors are not those of this {type(model).__name__}:\n' + '\n'.join(problems))

    with ThreadPoolExecutor(THREADS) as threads:

        def place(array: np.ndarray) -> jax.Array:  # a copy: no leaf stays a view of the file
            if param_dtype is not None:
                return jnp.array(array, dtype=param_dtype)
            return jax.device_put(aligned_copy(array, threads))

        flat = {rule.path: place(rule.to_flax(tensors[rule.name])) for rule in track(list(shapes))}
    variables = unflatten_dict(flat)
    return stack_layers(variables) if stacked else variables


def aligned_copy(array: np.ndarray, threads: Executor) -> np.ndarray:
    """A copy in the order of its axes, which JAX on a CPU takes over as it is; jnp.array compiles for each shape.

    Of a matrix a few columns at a time: of a transposed one numpy goes by rows of the original, which takes four times
    as long.
    """
    place = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -place.ctypes.data % ALIGNMENT
    copy = place[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

    def fill(target: np.ndarray, source: np.ndarray) -> None:
        for column in range(0, source.shape[1], COLUMNS):
            target[:, column : column + COLUMNS] = source[:, column : column + COLUMNS]

    if array.ndim == 2:
        list(threads.map(fill, np.array_split(copy, THREADS), np.array_split(array, THREADS)))
    else:
        copy[...] = array
    return copy


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by PyTorch name out of the variables of `model`, dtypes kept.

    Raises ConversionError when the variables are not those of the model.
    """
    try:
        check_variables(model, variables)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    flat = flatten_dict(unstack_layers(variables) if is_stacked(model) else variables)
    rules = {path: leaf(path, np.ndim(array)) for path, array in flat.items()}
    return {rule.name: np.array(rule.to_torch(np.asarray(flat[path])), order='C') for path, rule in rules.items()}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each name that is missing (-), left over (+) or has another shape than expected."""
    return [
        *(f'  - {name} {shape(size)}: missing' for name, size in expected.items() if name not in found),
        *(f'  + {name} {shape(size)}: not part of the model' for name, size in found.items() if name not in expected),
        *(
            f'  {name}: the shape is {shape(found[name])}, expected {shape(size)}'
            for name, size in expected.items()
            if name in found and tuple(found[name]) != tuple(size)
        ),
    ]


def shape(sizes: Iterable[Any]) -> str:
    """A shape as people write it: 'scalar' or '3 x 224 x 224'."""
    return ' x '.join(str(size) for size in sizes) or 'scalar'
