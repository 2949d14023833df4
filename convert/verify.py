"""The parity report: PyTorch and Flax side by side on the same images, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from convert.conversion import Inspection, inspect, place
from convert.params import torch_module_name
from convert.reference import table_difference, torch_module, torch_outputs
from flax_vit import SimpleViT
from flax_vit.layers import pair

FLOAT64_LIMIT = 1e-12  # rounding of float64 over the depth of a model; the mildest slip known is at 1e-5
FLOAT32_RATIO = 3.0  # times PyTorch's own rounding error
FLOAT32_FLOOR = 2.0**-24  # half a unit in the last place: nothing is left to compare below it


@dataclass(frozen=True)
class Row:
    """How far one part of the port is from PyTorch."""

    module: str  # PyTorch's name: 'transformer.layers.3.0'; '' for the whole
    label: str
    float64: float  # largest difference between the two in float64, relative to the largest value
    port: float  # root mean square error in float32, relative, against PyTorch's float64 outputs
    torch: float  # PyTorch's own

    @property
    def ratio(self) -> float:
        """The port's float32 error as a multiple of PyTorch's."""
        return self.port / self.torch if self.torch else float(self.port > 0) * float('inf')

    @property
    def right(self) -> bool:
        return self.float64 <= FLOAT64_LIMIT and (self.ratio <= FLOAT32_RATIO or self.port <= FLOAT32_FLOOR)


@dataclass(frozen=True)
class Report:
    """What was compared, and whether the port is right."""

    inspection: Inspection
    images: int
    rows: list[Row]
    table: tuple[float, float] | None  # SimpleViT: largest difference of the sincos tables, and what it may be
    agreement: float  # the share of images for which both predict the same class in float32
    predictions: np.ndarray  # the port's, in float32

    @property
    def right(self) -> bool:
        return all(row.right for row in self.rows) and (self.table is None or self.table[0] <= self.table[1])


def verify(
    source: Any,
    *,
    converted: tuple[nn.Module, Mapping[str, Any]] | None = None,
    images: np.ndarray | None = None,
    count: int = 8,
    seed: int = 0,
    key: str | None = None,
    **overrides: Any,
) -> Report:
    """Run vit-pytorch's module and the Flax model on the same images and compare every block.

    `source`, `key`, `overrides`: as of `inspect`. `converted`: the model and variables to verify; without them,
    `source` is converted. `images`: (batch, height, width, channels), float32; without them, `count` random ones.
    Raises ConversionError when torch or vit-pytorch is missing.
    """
    inspection = inspect(source, key=key, **overrides)
    height, width = pair(inspection.model.image_size)
    if images is None:
        shape = (count, height, width, inspection.model.channels)
        images = np.random.default_rng(seed).standard_normal(shape, np.float32)
    parts = labels(inspection.model)
    truth, theirs = (
        torch_outputs(torch_module(inspection, dtype), images.transpose(0, 3, 1, 2).astype(dtype), list(parts))
        for dtype in ('float64', 'float32')
    )
    with jax.enable_x64(True):
        model, variables = converted or (inspection.model, place(inspection))
        exact, ours = (flax_outputs(model, variables, images, dtype, list(parts)) for dtype in ('float64', 'float32'))
    rows = [
        Row(
            name,
            label,
            float64=largest(exact[name], truth[name]),
            port=mean_square(ours[name], truth[name]),
            torch=mean_square(theirs[name], truth[name]),
        )
        for name, label in parts.items()
    ]
    table = table_difference(model) if isinstance(model, SimpleViT) else None
    predictions = ours[''].argmax(axis=-1)
    agreement = float(np.mean(predictions == theirs[''].argmax(axis=-1)))
    return Report(inspection, len(images), rows, table, agreement, predictions)


def labels(model: nn.Module) -> dict[str, str]:
    """The parts that are compared, in the order they compute: PyTorch's names and what they are."""
    parts = {f'to_patch_embedding.{3 if model.patch_norm else 1}': 'patch embedding'}
    for block in range(model.depth):
        parts[f'transformer.layers.{block}.0'] = f'block {block} attention'
        parts[f'transformer.layers.{block}.1'] = f'block {block} feed-forward'
    return parts | {'to_latent': 'pooled features', '': 'logits' if model.num_classes else 'features'}


def flax_outputs(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, dtype: str, names: list[str]
) -> dict[str, np.ndarray]:
    """The outputs of the parts that PyTorch calls `names`, computed in `dtype` at the highest precision."""
    model = model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), precision='highest')

    def wanted(module: nn.Module, method: str) -> bool:
        return method == '__call__' and torch_module_name(module.path) in names

    @jax.jit
    def outputs(variables: Mapping[str, Any], images: jax.Array) -> Any:
        return model.apply(variables, images, capture_intermediates=wanted, mutable=['intermediates'])[1]

    cast = jax.tree.map(lambda array: jnp.asarray(array, dtype), variables)
    captured = flatten_dict(outputs(cast, jnp.asarray(images, dtype))['intermediates'])
    return {torch_module_name(path[:-1]): np.asarray(output) for path, (output,) in captured.items()}


def largest(values: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(values - truth).max() / np.abs(truth).max())


def mean_square(values: np.ndarray, truth: np.ndarray) -> float:
    """The root mean square of the difference, relative to that of the truth."""
    return float(np.sqrt(np.mean((values - truth) ** 2) / np.mean(truth**2)))
