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
from convert.params import leaf, torch_module_name
from convert.reference import table_difference, torch_gradients, torch_module, torch_outputs
from flax_vit import SimpleViT
from flax_vit.layers import pair

OUTPUT_LIMIT = 1e-12  # of float64: rounding over the depth of a model; the mildest slip known is at 1e-5
GRADIENT_LIMIT = 1e-11  # of float64: the way back adds as many roundings again, and sums over the batch
RATIO = 3.0  # times PyTorch's own rounding error
# Half a unit in the last place of each dtype: below it nothing is left to compare.
FLOOR = {'float32': 2.0**-24, 'bfloat16': 2.0**-9, 'float16': 2.0**-12}
# A gradient that is by nature zero (of what a norm removes) is rounding noise, a few 1e-15 of the largest gradient,
# which must stay below the limit: errors are taken relative to at least this share of the largest.
SMALLEST = 1e-3


@dataclass(frozen=True)
class Row:
    """How far one part of the port is from PyTorch. Errors are relative."""

    name: str  # PyTorch's: 'transformer.layers.3.0'; '' for the whole; a parameter's for its gradient
    label: str
    exact: float  # the largest difference of the two in float64
    worst: tuple[int, ...]  # where that is
    port: float  # root mean square error in the compared dtype against PyTorch in float64
    torch: float  # PyTorch's own
    limit: float  # of `exact`
    floor: float  # of `port`

    @property
    def ratio(self) -> float:
        """The port's error as a multiple of PyTorch's."""
        return self.port / self.torch if self.torch else float('inf') if self.port else 0.0

    @property
    def right(self) -> bool:
        return self.exact <= self.limit and (self.ratio <= RATIO or self.port <= self.floor)


@dataclass(frozen=True)
class Report:
    """What was compared, and whether the port is right."""

    inspection: Inspection
    dtype: str
    images: int
    rows: list[Row]
    gradients: list[Row]
    table: tuple[float, float] | None  # SimpleViT: the largest difference of the sincos tables, and what it may be
    predictions: np.ndarray  # the port's classes, in the compared dtype
    agreement: float  # the share of images for which PyTorch predicts the same

    @property
    def right(self) -> bool:
        table_right = self.table is None or self.table[0] <= self.table[1]
        return table_right and all(row.right for row in self.rows + self.gradients)


def verify(
    source: Any,
    *,
    converted: tuple[nn.Module, Mapping[str, Any]] | None = None,
    images: np.ndarray | None = None,
    count: int = 8,
    seed: int = 0,
    dtype: str = 'float32',
    gradients: bool = False,
    key: str | None = None,
    **overrides: Any,
) -> Report:
    """Run vit-pytorch's module and the Flax model on the same images, in float64 and in `dtype`; compare every block.

    `source`, `key`, `overrides`: as of `inspect`. `converted`: the model and variables to verify; without them,
    `source` is converted. `images`: (batch, height, width, channels), float32; without them, `count` random ones.
    `gradients` adds those of every parameter. The Flax model runs at the highest precision of matrix products.
    Raises ConversionError when torch or vit-pytorch is missing.
    """
    inspection = inspect(source, key=key, **overrides)
    random = np.random.default_rng(seed)
    if images is None:
        shape = (count, *pair(inspection.model.image_size), inspection.model.channels)
        images = random.standard_normal(shape, np.float32)
    with jax.enable_x64(True):
        model, variables = converted or (inspection.model, place(inspection))
        parts = labels(inspection.model)
        outputs = [
            run(images, list(parts))
            for run in (
                lambda *rest: torch_outputs(torch_module(inspection, 'float64'), *rest),
                lambda *rest: torch_outputs(torch_module(inspection, dtype), *rest),
                lambda *rest: flax_outputs(model, variables, 'float64', *rest),
                lambda *rest: flax_outputs(model, variables, dtype, *rest),
            )
        ]
        rows = [
            _row(name, label, OUTPUT_LIMIT, dtype, *(each[name] for each in outputs)) for name, label in parts.items()
        ]
        gradient_rows = []
        if gradients:
            weights = random.standard_normal(outputs[0][''].shape)
            sides = [
                torch_gradients(torch_module(inspection, 'float64'), images, weights),
                torch_gradients(torch_module(inspection, dtype), images, weights),
                flax_gradients(model, variables, 'float64', images, weights),
                flax_gradients(model, variables, dtype, images, weights),
            ]
            scale = SMALLEST * max(np.abs(gradient).max() for gradient in sides[0].values())
            gradient_rows = [
                _row(name, f'gradient of {name}', GRADIENT_LIMIT, dtype, *(side[name] for side in sides), scale=scale)
                for name in sides[0]
            ]
    predictions = outputs[3][''].argmax(axis=-1)
    return Report(
        inspection,
        dtype,
        len(images),
        rows,
        gradient_rows,
        table=table_difference(model) if isinstance(model, SimpleViT) else None,
        predictions=predictions,
        agreement=float(np.mean(predictions == outputs[1][''].argmax(axis=-1))),
    )


def labels(model: nn.Module) -> dict[str, str]:
    """The parts that are compared, in the order they compute: PyTorch's names and what they are."""
    parts = {f'to_patch_embedding.{3 if model.patch_norm else 1}': 'patch embedding'}
    for block in range(model.depth):
        parts[f'transformer.layers.{block}.0'] = f'block {block} attention'
        parts[f'transformer.layers.{block}.1'] = f'block {block} feed-forward'
    return parts | {'to_latent': 'pooled features', '': 'logits' if model.num_classes else 'features'}


def flax_outputs(
    model: nn.Module, variables: Mapping[str, Any], dtype: str, images: np.ndarray, names: list[str]
) -> dict[str, np.ndarray]:
    """The outputs, as float64, of the parts that PyTorch calls `names`, computed in `dtype`."""

    def wanted(module: nn.Module, method: str) -> bool:
        return method == '__call__' and torch_module_name(module.path) in names

    @jax.jit
    def outputs(variables: Mapping[str, Any], images: jax.Array) -> Any:
        exact = model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), precision='highest')
        return exact.apply(variables, images, capture_intermediates=wanted, mutable=['intermediates'])[1]

    captured = flatten_dict(outputs(*cast((variables, images), dtype))['intermediates'])
    return {torch_module_name(path[:-1]): np.asarray(output, np.float64) for path, (output,) in captured.items()}


def flax_gradients(
    model: nn.Module, variables: Mapping[str, Any], dtype: str, images: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradients, as float64, of the sum of weights x logits, by PyTorch's names and in its order of axes."""

    @jax.jit
    @jax.grad
    def gradients(variables: Mapping[str, Any], images: jax.Array, weights: jax.Array) -> jax.Array:
        exact = model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), precision='highest')
        logits: Any = exact.apply(variables, images)
        return (logits * weights).sum()

    flat = flatten_dict(gradients(*cast((variables, images, weights), dtype))['params'])
    rules = {path: leaf(path, gradient.ndim) for path, gradient in flat.items()}
    return {rule.name: rule.to_torch(np.asarray(flat[path], np.float64)) for path, rule in rules.items()}


def cast(tree: Any, dtype: str) -> Any:
    """Every array of the tree in `dtype`."""
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)


def _row(name: str, label: str, limit: float, dtype: str, *outputs: np.ndarray, scale: float = 0.0) -> Row:
    truth, theirs, exact, ours = outputs
    difference = np.abs(exact - truth)
    worst = tuple(int(index) for index in np.unravel_index(difference.argmax(), difference.shape))
    largest, mean_square = max(np.abs(truth).max(), scale), max(np.sqrt(np.mean(truth**2)), scale)
    return Row(
        name,
        label,
        exact=float(difference[worst] / largest),
        worst=worst,
        port=float(np.sqrt(np.mean((ours - truth) ** 2)) / mean_square),
        torch=float(np.sqrt(np.mean((theirs - truth) ** 2)) / mean_square),
        limit=limit,
        floor=FLOOR.get(dtype, limit),
    )
