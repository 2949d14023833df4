"""The variables of a model: which there are, of which shape, and whether given ones are they."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_vit.architectures import MODELS, classes
from flax_vit.checks import FLOATS, pair
from flax_vit.layers import Transformer
from flax_vit.stacking import stacked_path, unstacked_path


def variable_shapes(model: nn.Module) -> Mapping[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of the model's variables by path, ('params', …); nothing is computed.

    Of blocks that are alike one is traced for all, however many there are.
    """
    # of any dtype, also of one that JAX has switched off
    model = reads_channels_last(model).clone(dtype=None, param_dtype=jnp.float32)
    if not hasattr(model, 'scan_layers'):
        return _traced_shapes(model)
    shapes = {}
    for path, shape in _traced_shapes(model.clone(depth=1, scan_layers=False)).items():
        block, stacked = stacked_path(path)
        if block is None:
            shapes[path] = shape
        elif model.scan_layers:
            shapes[stacked] = jax.ShapeDtypeStruct((model.depth, *shape.shape), shape.dtype)
        else:
            shapes |= {unstacked_path(stacked, number): shape for number in range(model.depth)}
    return dict(sorted(shapes.items()))


@cache  # tracing a block takes a fortieth of a second, and reading a folder asks several times
def _traced_shapes(model: nn.Module) -> Mapping[tuple[str, ...], jax.ShapeDtypeStruct]:
    def init(inputs: jax.Array) -> Any:
        return model.init(jax.random.key(0), inputs)  # a key made out here would be compiled, and take hold of a device

    inputs = jax.ShapeDtypeStruct((1, *input_shape(model)), jnp.float32)
    return MappingProxyType(flatten_dict(jax.eval_shape(init, inputs)))


def input_shape(model: Any) -> tuple[int, ...]:
    """Of one image (height, width, channels), or of tokens (tokens, dim) where it is a Transformer."""
    return (8, model.dim) if isinstance(model, Transformer) else (*pair(model.image_size), model.channels)


def reads_channels_last(model: Any) -> Any:
    """The model told that images, where it takes some, are channels last."""
    return model if isinstance(model, Transformer) else model.clone(image_format='channels_last')


def saved_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The same as they are written in a file."""
    return {'/'.join(path): shape.shape for path, shape in variable_shapes(model).items()}


def collections_of(model: nn.Module) -> list[str]:
    """What linen calls the groups of its variables: 'params' and, where it has a BatchNorm, 'batch_stats'."""
    return list(dict.fromkeys(path[0] for path in variable_shapes(model)))


def check_variables(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """ValueError unless these are the variables of the model: the names, the shapes."""
    name = type(model).__name__
    if type(model) not in classes().values():
        raise ValueError(f'The model must be one of {", ".join(MODELS)}, not a {name}.')
    collections = collections_of(model)
    if not isinstance(variables, Mapping) or set(variables) != set(collections):
        found = f'a dict of {sorted(variables)}' if isinstance(variables, Mapping) else f'a {type(variables).__name__}'
        expected = ', '.join(f"'{collection}': …" for collection in collections)
        raise ValueError(f'The variables of a {name} are {{{expected}}}, not {found}.')
    shapes = {'/'.join(map(str, path)): getattr(array, 'shape', ()) for path, array in flatten_dict(variables).items()}
    check_shapes(saved_shapes(model), shapes, f'The variables of this {name}')


def check_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """ValueError that lists every difference."""
    problems = [
        f'  {path}: the shape is {shapes.get(path, "missing")}, expected {expected.get(path, "nothing")}'
        for path in sorted(expected.keys() | shapes.keys())
        if shapes.get(path) != expected.get(path)
    ]
    if problems:
        raise ValueError(f'{what} are not the parameters of this model:\n' + '\n'.join(problems))


def check_dtypes(dtypes: Mapping[str, str], what: str) -> None:
    """ValueError that lists what is no floating-point number of 16 bits and more."""
    strange = [f'  {path}: {dtype}' for path, dtype in sorted(dtypes.items()) if dtype not in FLOATS]
    if strange:
        raise ValueError(f'{what} should be {", ".join(FLOATS)}; not so:\n' + '\n'.join(strange))
