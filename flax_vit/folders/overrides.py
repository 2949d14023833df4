"""Other fields than the saved ones: which parameters stay, which are new, which are resized."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from flax_vit.checks import pair
from flax_vit.parameters import input_shape, reads_channels_last

CUT = {'patch_size', 'channels'}  # what the first matrix's rows are; others may happen to fit its shape

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Changes:
    """What becomes of a folder's parameters in a model with other fields, by path."""

    kept: frozenset[str]  # with the saved shape; the positions too, if they are resized
    new: frozenset[str]
    resized: str | None  # the path of the positions, if they are
    function: Mapping[str, tuple[Any, Any]]  # fields that make another function of the weights: saved and new value

    @property
    def notes(self) -> list[str]:
        """What the caller should know."""
        notes = []
        if self.new:
            notes.append(f'The head is new and untrained ({", ".join(sorted(self.new))}); `key` gives other values.')
        if self.resized:
            notes.append(
                f'{self.resized} is resized to the new image_size, bicubic; fine-tune, or check what it costs.'
            )
        for name, (old, new) in self.function.items():
            notes.append(f'{name}={new!r} instead of {old!r} makes another function of the same weights.')
        return notes


def changes(model_class: Any, saved: Shapes, wanted: Shapes, overrides: Mapping[str, tuple[Any, Any]]) -> Changes:
    """From the saved parameters to those of the model with `overrides`, (saved, new) values of fields.

    ValueError when that takes more than another head or other learned positions; and for other patches.
    """
    overrides = {name: both for name, both in overrides.items() if both[0] != both[1]}
    different = {path for path in saved.keys() | wanted.keys() if saved.get(path) != wanted.get(path)}
    head = {path for path in different if path.startswith(f'params/{model_class.HEAD}')}
    positions = positions_of(model_class)
    problems = sorted(different - head - {positions})
    if problems:
        fields = ', '.join(f'{name}={value!r}' for name, (_, value) in overrides.items())
        lines = [
            f'  {path}: saved {saved.get(path, "nothing")}, needed {wanted.get(path, "nothing")}' for path in problems
        ]
        both = {'heads', 'dim_head'}  # which share an axis, in all models whose weights don't tell them
        alone = both <= set(model_class.SAME_WEIGHTS) and len(both & overrides.keys()) == 1
        together = '; heads and dim_head change together, as their product is in the shapes' if alone else ''
        raise ValueError(
            f'The saved parameters do not fit a model with {fields}; only num_classes and image_size may change their '
            f'shapes{together}:\n' + '\n'.join(lines)
        )
    for name in sorted(CUT & overrides.keys()):
        old, new = overrides[name]
        if pair(old) != pair(new):
            raise ValueError(
                f'{name}={new!r} does not fit the saved parameters: their first matrix is for {name}={old!r}.'
            )
    function = {name: both for name, both in overrides.items() if name in model_class.SAME_WEIGHTS}
    resized = positions if positions in different else None
    return Changes(frozenset(wanted.keys() - head), frozenset(head & wanted.keys()), resized, function)


def positions_of(model_class: Any) -> str | None:
    """The path of its learned positions."""
    return f'params/{model_class.POSITIONS}' if model_class.POSITIONS else None


def resize_positions(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Learned positions (…, tokens, dim) of an `old` grid of patches, (rows, columns), for a `new` one.

    Bicubic, as `torch.nn.functional.interpolate(…, size=new, mode='bicubic')` computes it, without antialiasing. What
    comes before the patches' positions, a class token's, is kept.
    """
    table = np.asarray(table, np.promote_types(table.dtype, np.float32))
    *batch, tokens, dim = table.shape
    others = tokens - math.prod(old)
    patches = jnp.asarray(table[..., others:, :].reshape(*old, dim))
    resized = jax.image.resize(patches, (*new, dim), 'cubic-pytorch', antialias=False)
    return np.concatenate([table[..., :others, :], np.asarray(resized).reshape(*batch, math.prod(new), dim)], axis=-2)


def initial(model: Any, paths: Collection[str], key: Array, shardings: Mapping[str, Any]) -> dict[str, Array]:
    """The parameters at these paths as `model.init(key, …)` gives them; of the others, none is computed."""
    images = jnp.zeros((1, *input_shape(model)))
    model = reads_channels_last(model)

    def init(key: Array) -> dict[str, Array]:
        flat = {'/'.join(path): array for path, array in flatten_dict(model.init(key, images)).items()}
        return {path: flat[path] for path in paths}

    return jax.jit(init, out_shardings={path: shardings[path] for path in paths})(key)
