"""Parameters one block after another, as in PyTorch, or stacked over the depth, as `scan_layers` has them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model for the same model with `scan_layers=True`; the same bits.

    `transformer/layers_3_0/…` of every block becomes one `transformer/blocks/layers_0/…`, whose first axis is the
    depth.

    Args:
        variables: Any tree with the parameters' names (gradients, moments of an optimizer), also one of
            jax.ShapeDtypeStructs, whose shardings are left out: ask `shardings` for new ones.

    Returns:
        The tree with stacked arrays.

    Raises:
        ValueError: When blocks are missing or differ.
    """

    def stack(path: Path, arrays: Sequence[Any]) -> Any:
        kinds = sorted({f'{array.shape} {array.dtype}' for array in arrays})
        if len(kinds) > 1:
            raise ValueError(f'{"/".join(path)} of the blocks cannot be stacked: it is {", ".join(kinds)}.')
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
        return np.stack(arrays) if all(isinstance(array, np.ndarray) for array in arrays) else jnp.stack(arrays)

    return unflatten_dict(stacked(flatten_dict(variables), stack))


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model with `scan_layers=True` for the same model without; undoes `stack_layers`.

    Args:
        variables: Any tree with the parameters' names, as of `stack_layers`.

    Returns:
        The tree with arrays for each block; what is not stacked, as it is.
    """
    flat: dict[Path, Any] = {}
    for path, array in flatten_dict(variables).items():
        if 'blocks' in path:
            at = path.index('blocks')
            shape_alone = isinstance(array, jax.ShapeDtypeStruct)
            parts = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype)] * array.shape[0] if shape_alone else array
            for block, part in enumerate(parts):
                flat[(*path[:at], path[at + 1].replace('layers_', f'layers_{block}_'), *path[at + 2 :])] = part
        else:
            flat[path] = array
    return unflatten_dict(flat)


def stacked(flat: Mapping[Path, Any], stack: Callable[[Path, Sequence[Any]], Any]) -> dict[Path, Any]:
    """What belongs to a block, by path, put together by `stack(path, one for each block)`; the rest as it is.

    ValueError unless every block has the same.
    """
    result: dict[Path, Any] = {}
    blocks: dict[Path, dict[int, Any]] = {}
    for path, value in flat.items():
        block, target = stacked_path(path)
        if block is None:
            result[path] = value
        else:
            blocks.setdefault(target, {})[block] = value
    depth = max((len(values) for values in blocks.values()), default=0)
    for path, values in blocks.items():
        if sorted(values) != list(range(depth)):
            raise ValueError(
                f'{"/".join(path)} cannot be stacked: all {depth} blocks must have it, not only {sorted(values)}.'
            )
        result[path] = stack(path, [values[block] for block in range(depth)])
    return result


def stacked_path(path: Path) -> tuple[int | None, Path]:
    """The block that an unstacked path belongs to, or None, and the path when stacked."""
    for at, name in enumerate(path):
        match = re.fullmatch(r'layers_(\d+)_(\d+)', name)
        if match:
            return int(match[1]), (*path[:at], 'blocks', f'layers_{match[2]}', *path[at + 1 :])
    return None, path
