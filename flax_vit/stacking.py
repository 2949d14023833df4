"""Parameters one block after another, as in PyTorch, or stacked over the depth, as `scan_layers` has them."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model for the same model with `scan_layers=True`; the same bits.

    `transformer/layers_3_0/…` of every block becomes one `transformer/blocks/layers_0/…`, whose first axis is the
    depth. Any tree with the parameters' names will do (gradients, moments of an optimizer). Raises ValueError when
    blocks are missing or differ.
    """
    flat: dict[Path, Any] = {}
    blocks: dict[Path, dict[int, Any]] = {}
    for path, array in flatten_dict(variables).items():
        block, stacked = _stacked(path)
        if block is None:
            flat[path] = array
        else:
            blocks.setdefault(stacked, {})[block] = array
    depth = max((len(arrays) for arrays in blocks.values()), default=0)
    for path, arrays in blocks.items():
        kinds = sorted({f'{np.shape(array)} {array.dtype}' for array in arrays.values()})
        if sorted(arrays) != list(range(depth)) or len(kinds) > 1:
            raise ValueError(
                f'{"/".join(path)} cannot be stacked: all {depth} blocks must have it, in one shape and dtype; '
                f'found in the blocks {sorted(arrays)}, as {", ".join(kinds)}.'
            )
        ordered = [arrays[block] for block in range(depth)]
        numpy = all(isinstance(array, np.ndarray) for array in ordered)
        flat[path] = np.stack(ordered) if numpy else jnp.stack(ordered)
    return unflatten_dict(flat)


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model with `scan_layers=True` for the same model without; undoes `stack_layers`."""
    flat: dict[Path, Any] = {}
    for path, array in flatten_dict(variables).items():
        if 'blocks' in path:
            at = path.index('blocks')
            for block, part in enumerate(array):
                flat[(*path[:at], path[at + 1].replace('layers_', f'layers_{block}_'), *path[at + 2 :])] = part
        else:
            flat[path] = array
    return unflatten_dict(flat)


def _stacked(path: Path) -> tuple[int | None, Path]:
    """The block of an unstacked parameter, or None, and its path when stacked."""
    for at, name in enumerate(path):
        match = re.fullmatch(r'layers_(\d+)_(\d+)', name)
        if match:
            return int(match[1]), (*path[:at], 'blocks', f'layers_{match[2]}', *path[at + 1 :])
    return None, path
