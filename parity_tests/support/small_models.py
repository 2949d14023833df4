"""Models of one block, to be saved and read, with random parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_vit import DeepViT, SimpleViT, ViT
from flax_vit.parameters import variable_shapes

MODELS = {
    'simple': SimpleViT(image_size=(8, 12), patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20),
    'deep': DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20, pool='mean'),
    'vit': ViT(image_size=(8, 12), patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20),
}


def variables_of(model: Any, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = variable_shapes(model)
    flat = {path: jnp.asarray(random.normal(size=shape.shape), model.param_dtype) for path, shape in shapes.items()}
    return unflatten_dict(flat)


def assert_equal(one: Any, other: Any) -> None:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    assert all(jax.tree.leaves(same)), same
