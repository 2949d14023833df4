"""How the parameters lie on many devices: rules as data, and the shardings that they give."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str | re.Pattern[str], PartitionSpec]]

# The first rule whose pattern is found in a parameter's path counts. It says how the trailing axes are split, so that
# it also holds where blocks are stacked along a leading axis; what no rule names is whole on every device. Batches go
# over the mesh's axis 'data', of which no parameter knows.
#
# In a feed-forward the first matrix is split by columns and the second by rows: each device has some hidden units, and
# the one exchange is the sum after the second. An attention would be the same if to_qkv's columns were split by heads.
# They run over (qkv, head, dim_head), as in PyTorch's file, and a split of that axis cuts across the three; so the
# compiler gathers to_qkv's activations, once for each block, and goes on with whole heads per device up to the sum
# after to_out. (Splitting its rows would cost a sum of the same activations, twice that. DeepViT's re-attention mixes
# heads: the mixed maps are a sum over the devices, and the mean of their squares another; on CPUs, which sum slices,
# single heads' maps go between them instead.)
#
# Between the blocks activations are whole: the patch projection ends with a sum, hence its rows, and the head takes
# whole features, hence its columns. The other way round, the compiler would split the features everywhere, and exchange
# something for every LayerNorm.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r'to_patch_embedding_\d/kernel$', PartitionSpec('model', None)),
    (r'to_qkv/kernel$', PartitionSpec(None, 'model')),
    (r'to_out(_0)?/kernel$', PartitionSpec('model', None)),
    (r'net_1/kernel$', PartitionSpec(None, 'model')),
    (r'net_1/bias$', PartitionSpec('model')),
    (r'net_[34]/kernel$', PartitionSpec('model', None)),
    (r'(linear|mlp)_head(_1)?/kernel$', PartitionSpec(None, 'model')),
)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """A tree of shardings for a tree of arrays, or of their shapes: variables, a whole training state, an nnx state.

    `rules` are pairs of a regular expression and the split of the trailing axes. An axis that the mesh does not divide
    stays whole; so does an array with fewer axes than its rule. Raises ValueError when a rule names an axis that the
    mesh does not have, or when the mesh does not leave the layout to the compiler.
    """
    check_mesh(mesh, rules)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')  # in an nnx.Variable
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        leading = len(leaf.shape) - len(spec)
        if leading < 0:
            return NamedSharding(mesh, PartitionSpec())
        split = [
            entry if size % math.prod(mesh.shape[axis] for axis in _axes(entry)) == 0 else None
            for size, entry in zip(leaf.shape, (None,) * leading + tuple(spec), strict=True)
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
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f'{mesh} asks for explicit shardings; the models leave them to the compiler. Make it with '
            f'axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}.'
        )
    named = {name for _, spec in rules for entry in spec for name in _axes(entry)}
    if not named <= set(mesh.axis_names):
        raise ValueError(
            f'The rules split over {sorted(named)}; the axes of this mesh are {list(mesh.axis_names)}. Name its axes '
            'so (one may have the size 1), or give other rules; () splits nothing.'
        )


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh that an entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else entry or ()
