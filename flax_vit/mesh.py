"""What a model needs on a mesh of devices: how its parameters are split, as data, and a call that can be split."""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift
from jax.sharding import AxisType, PartitionSpec

Rules = Sequence[tuple[str | re.Pattern[str], PartitionSpec]]
COLUMNS, ROWS = PartitionSpec(None, 'model'), PartitionSpec('model', None)  # of a kernel (in, out)

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
#
# These are the parts that the models share; each says in its SPLIT what there is beside them.
SHARED: Rules = (
    (r'to_patch_embedding_\d/kernel$', ROWS),
    (r'to_qkv/kernel$', COLUMNS),
    (r'to_out(_0)?/kernel$', ROWS),
    (r'net_1/kernel$', COLUMNS),
    (r'net_1/bias$', PartitionSpec('model')),
    (r'net_[34]/kernel$', ROWS),
)


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

                def by_image(path: Any, array: Any) -> PartitionSpec:
                    leading = [None] if any(getattr(key, 'key', '') == 'blocks' for key in path) else []  # the depth
                    of_images = array.shape[len(leading) :][:1] == (size,)
                    return PartitionSpec(*leading, split) if of_images else PartitionSpec()

                with jax.sharding.use_abstract_mesh(mesh):
                    params = jax.sharding.reshard(params, PartitionSpec())
                    logits, sown = jax.sharding.reshard(
                        (logits, sown), jax.tree_util.tree_map_with_path(by_image, (logits, sown))
                    )
                return logits, (params, sown)

            return lift.pack(run, (True,), (['params', 'batch_stats'], True), (True,))

        return nn.transforms.lift_transform(lifted, lambda self, images: call(self, images, train))(self, images)

    return anywhere
