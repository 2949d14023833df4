"""How the parameters lie on many devices: rules as data, and the shardings that they give."""

import math
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import lift
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
    (r'(net_[34]|mlp_head_4)/kernel$', PartitionSpec('model', None)),
    (r'((linear|mlp)_head(_1)?|(^|/)head)/kernel$', PartitionSpec(None, 'model')),
    # an OfficialSimpleViT's, whose heads have an axis: split by heads, nothing is gathered
    (r'/(query|key|value)/kernel$', PartitionSpec(None, 'model', None)),
    (r'/(query|key|value)/bias$', PartitionSpec('model', None)),
    (r'/out/kernel$', PartitionSpec('model', None, None)),
)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """A tree of shardings for a tree of arrays, or of their shapes.

    An axis that the mesh does not divide stays whole; so does an array with fewer axes than its rule.

    Args:
        tree: Variables, a whole training state, an nnx state: whatever has the parameters' names in its paths.
        mesh: The devices, with axes named as in the rules.
        rules: Pairs of a regular expression for a path and the split of the trailing axes; the first that is found
            counts.

    Returns:
        The same tree, with a NamedSharding for each array.

    Raises:
        ValueError: When a rule is none, or names an axis that the mesh does not have.
    """
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


def laid_out_by_the_compiler(call: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `__call__(self, images, train)`, inside of which every axis of a mesh is Auto.

    With explicit axes, `jax.make_mesh`'s default, a product over a split axis and a reshape of one would each have to
    say how their results are split. The logits, and what is sown for each image, leave it split as the images are;
    parameters that `init` makes are whole. Where no axis is explicit, it is `call`.
    """

    @wraps(call)
    def anywhere(self: nn.Module, images: Any, train: bool = False) -> Any:
        arrays = [leaf for leaf in jax.tree.leaves((images, self.variables)) if isinstance(leaf, jax.Array)]
        meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
        mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
        if mesh is None:
            return call(self, images, train)
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        inside = mesh.update_axis_types({name: AxisType.Auto for name, kind in types if kind == AxisType.Explicit})

        def lifted(inner: Callable[..., Any]) -> Callable[..., Any]:
            # As jax.sharding.auto_axes, which can't split each of the sown arrays by its shape.
            def run(scope_of: Any, made_in: Any, variables: Any, rngs: Any, images: Any) -> Any:
                with jax.sharding.use_abstract_mesh(inside):
                    # A spec says nothing of Auto axes: all stays where it is.
                    variables, rngs, given = jax.sharding.reshard((variables, rngs, images), PartitionSpec())
                    scope = scope_of(variables, rngs)
                    logits = inner(scope, given)
                    params, sown = made_in(scope)
                size, split = images.shape[0], jax.typeof(images).sharding.spec[0]

                def by_image(array: Any) -> PartitionSpec:  # scanned blocks have an axis in front of the images
                    axes = array.shape[:2]
                    return PartitionSpec(*[None] * axes.index(size), split) if size in axes else PartitionSpec()

                with jax.sharding.use_abstract_mesh(mesh):
                    params = jax.sharding.reshard(params, PartitionSpec())
                    logits, sown = jax.sharding.reshard((logits, sown), jax.tree.map(by_image, (logits, sown)))
                return logits, (params, sown)

            return lift.pack(run, (True,), (['params', 'batch_stats'], True), (True,))

        return nn.transforms.lift_transform(lifted, lambda self, images: call(self, images, train))(self, images)

    return anywhere
