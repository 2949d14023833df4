"""Parameters one block after another, as in PyTorch, or stacked over the depth, as `scan_layers` has them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

Path = tuple[Any, ...]  # an optimizer's dicts may have other keys than strings


def is_stacked(model: Any) -> bool:
    """Whether the blocks of the model have their parameters in one array: a model whose blocks differ can't."""
    return getattr(model, 'scan_layers', False)


def one_by_one(model: Any) -> Any:
    """The model with parameters for each block."""
    return model.clone(scan_layers=False) if is_stacked(model) else model


def stack_layers(variables: Any) -> Any:
    """The variables of a model for the same model with `scan_layers=True`; the same bits.

    `transformer/layers_3_0/…` of every block becomes one `transformer/blocks/layers_0/…`, whose first axis is the
    depth.

    Args:
        variables: Any tree with dicts that have the parameters' names (gradients, the state of an optimizer, a mask,
            which must say the same of all blocks), also one of jax.ShapeDtypeStructs, whose shardings are left out: ask
            `shardings` for new ones.

    Returns:
        The tree with stacked arrays.

    Raises:
        ValueError: When blocks are missing or differ.
    """

    def stack(path: Path, arrays: Sequence[Any]) -> Any:
        if not all(_is_array(array) for array in arrays):
            if any(array != arrays[0] for array in arrays):
                raise ValueError(
                    f'{"/".join(path)} of the blocks cannot be stacked: it is {", ".join(map(str, arrays))}.'
                )
            return arrays[0]
        kinds = sorted({f'{array.shape} {array.dtype}' for array in arrays})
        if len(kinds) > 1:
            raise ValueError(f'{"/".join(path)} of the blocks cannot be stacked: it is {", ".join(kinds)}.')
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
        return np.stack(arrays) if all(isinstance(array, np.ndarray) for array in arrays) else jnp.stack(arrays)

    return in_dicts(variables, lambda flat: stacked(flat, stack))


def unstack_layers(variables: Any) -> Any:
    """The variables of a model with `scan_layers=True` for the same model without; undoes `stack_layers`.

    Args:
        variables: Any tree with dicts that have the parameters' names, as of `stack_layers`.

    Returns:
        The tree with arrays for each block; what is not stacked, as it is.

    Raises:
        ValueError: When no array tells how many blocks there are.
    """

    def unstack(flat: Mapping[Path, Any]) -> dict[Path, Any]:
        result: dict[Path, Any] = {}
        depth = next((array.shape[0] for path, array in flat.items() if 'blocks' in path and _is_array(array)), None)
        for path, array in flat.items():
            if 'blocks' not in path:
                result[path] = array
                continue
            if depth is None:
                raise ValueError(f'It has no array, so the number of blocks is unknown: {"/".join(path)}.')
            parts: Any = array
            if isinstance(array, jax.ShapeDtypeStruct):
                parts = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype)] * depth
            elif not _is_array(array):
                parts = [array] * depth
            result |= {unstacked_path(path, block): part for block, part in enumerate(parts)}
        return result

    return in_dicts(variables, unstack)


def in_dicts(tree: Any, change: Callable[[Mapping[Path, Any]], Mapping[Path, Any]]) -> Any:
    """The tree with its dicts changed, by paths: itself, or those in it, as an optimizer's state has them."""

    def changed(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        flat = flatten_dict(node, keep_empty_nodes=True)
        return unflatten_dict(change({p: v if v is empty_node else in_dicts(v, change) for p, v in flat.items()}))

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, Mapping))


def _is_array(value: Any) -> bool:
    return hasattr(value, 'dtype')


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
        match = re.fullmatch(r'layers_(\d+)_(\d+)', str(name))
        if match:
            return int(match[1]), (*path[:at], 'blocks', f'layers_{match[2]}', *path[at + 1 :])
    return None, path


def unstacked_path(path: Path, block: int) -> Path:
    """The path of that block's part of what is at a stacked `path`."""
    at = path.index('blocks')
    return *path[:at], path[at + 1].replace('layers_', f'layers_{block}_'), *path[at + 2 :]
