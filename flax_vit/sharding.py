"""How the parameters lie on many devices: the rules of all models, and the shardings that they give."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_vit.architectures import MODELS
from flax_vit.mesh import Rules


def default_rules() -> Rules:
    """How parameters are split unless told otherwise: by what the models say in SPLIT."""
    return list(dict.fromkeys(rule for model in MODELS.values() for rule in model.SPLIT))


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> Any:
    """A tree of shardings for a tree of arrays, or of their shapes.

    An axis that the mesh does not divide stays whole; so does an array with fewer axes than its rule.

    Args:
        tree: Variables, a whole training state, an nnx state: whatever has the parameters' names in its paths.
        mesh: The devices, with axes named as in the rules.
        rules: Pairs of a regular expression, searched for in a path, and the split of the trailing axes; the first that
            is found counts. None: those of the models, `default_rules()`.

    Returns:
        The same tree, with a NamedSharding for each array.

    Raises:
        ValueError: When a rule is none, or names an axis that the mesh does not have.
    """
    rules = default_rules() if rules is None else rules
    check_mesh(mesh, rules)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')  # in an nnx.Variable
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        shape = np.shape(leaf)  # of a number, too
        leading = len(shape) - len(spec)
        if leading < 0:
            return NamedSharding(mesh, PartitionSpec())
        split = [
            entry if size % math.prod(mesh.shape[axis] for axis in _axes(entry)) == 0 else None
            for size, entry in zip(shape, (None,) * leading + tuple(spec), strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_mesh(mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """ValueError unless these are a mesh and rules that fit each other."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f'mesh must be a jax.sharding.Mesh, such as jax.make_mesh makes, not {mesh!r}.')
    for rule in rules:
        pattern, spec = rule if isinstance(rule, tuple | list) and len(rule) == 2 else (None, None)
        if not (isinstance(pattern, str | re.Pattern) and isinstance(spec, PartitionSpec)):
            raise ValueError(
                f"A rule is a pair of a pattern and a PartitionSpec, ('kernel$', PartitionSpec('model')), not {rule!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'The pattern of the rule {rule!r} is no regular expression: {error}.') from error
    named = {name for _, spec in rules for entry in spec for name in _axes(entry)}
    if not named <= set(mesh.axis_names):
        raise ValueError(
            f'The rules split over {sorted(named)}; the axes of this mesh are {list(mesh.axis_names)}. Name its axes '
            'so (one may have the size 1), or give other rules; () splits nothing.'
        )


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh that an entry of a PartitionSpec names: None and UNCONSTRAINED name none."""
    return (entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else ()
