"""The parity report: PyTorch and Flax side by side on the same images, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from convert.causes import causes, table_causes
from convert.conversion import Inspection, inspect, place
from convert.params import leaf, torch_module_name
from convert.reference import table_difference, torch_gradients, torch_module, torch_outputs
from flax_vit import DeepViT, SimpleViT
from flax_vit.layers import pair
from flax_vit.stacking import unstack_layers

OUTPUT_LIMIT = 1e-12  # of float64: rounding over the depth of a model; the mildest slip known is at 1e-5
GRADIENT_LIMIT = 1e-11  # of float64: the way back adds as many roundings again, and sums over the batch
RATIO = 3.0  # times PyTorch's own rounding error
USUAL_RATIO = 1.5  # what most right ports stay below; the largest measured are in docs/proof.md
FALSE_ALARMS = 1e-6  # how often chance may call a part of a right port wrong
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
    ratio_limit: float
    floor: float  # of `port`, below which its ratio does not matter

    @property
    def ratio(self) -> float:
        """The port's error as a multiple of PyTorch's."""
        return self.port / self.torch if self.torch else float('inf') if self.port else 0.0

    @property
    def port_limit(self) -> float:
        """What `port` may be."""
        return max(self.ratio_limit * self.torch, self.floor)

    @property
    def right(self) -> bool:
        return self.exact <= self.limit and self.port <= self.port_limit


class Sides(NamedTuple):
    """The same output of all that is compared, as float64."""

    truth: np.ndarray  # PyTorch's in float64
    torch: np.ndarray  # PyTorch's in the compared dtype
    exact: np.ndarray  # the port's in float64
    port: np.ndarray  # the port's in the compared dtype


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
    logits: Sides  # each (batch, classes)
    inputs: np.ndarray  # the images
    seed: int | None  # of random images; None where images were given
    causes: list[str]  # why the first wrong part is wrong, in words; empty when all outputs are right
    attention: Mapping[str, tuple[np.ndarray, np.ndarray]]  # of one image: PyTorch's map and the port's, when asked for

    @property
    def criterion(self) -> str:
        """When a port is right, in words."""
        gradients = f', and of every gradient at most {GRADIENT_LIMIT:.0e}' if self.gradients else ''
        text = f'right when in float64 the difference of every part is at most {OUTPUT_LIMIT:.0e}{gradients}'
        if self.dtype != 'float64':
            text += (
                f', and in {self.dtype} the Flax model is at most {RATIO:.0f} times as far from the float64 truth as '
                'PyTorch itself (more for a part of fewer than 52 numbers, where chance weighs in)'
            )
        return f'{text}. All relative to the size of what is compared.'

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
    attention: bool = False,
    key: str | None = None,
    **overrides: Any,
) -> Report:
    """Run vit-pytorch's module and the Flax model on the same images, in float64 and in `dtype`; compare every block.

    `source`, `key`, `overrides`: as of `inspect`. `converted`: the model and variables to verify; without them,
    `source` is converted. `images`: (batch, height, width, channels), float32; without them, `count` random ones.
    `gradients` adds those of every parameter, `attention` the attention maps of the image whose logits differ most. The
    Flax model runs at the highest precision of matrix products.
    Raises ConversionError when torch or vit-pytorch is missing.
    """
    inspection = inspect(source, key=key, **overrides)
    random = np.random.default_rng(seed)
    given = images is not None
    if images is None:
        shape = (count, *pair(inspection.model.image_size), inspection.model.channels)
        images = random.standard_normal(shape, np.float32)
    with jax.enable_x64(True):
        model, variables = converted or (inspection.model, place(inspection))
        if model.scan_layers:  # for blocks that have a name each
            model, variables = model.clone(scan_layers=False), unstack_layers(variables)
        parts = labels(inspection.model)
        runs = (
            lambda dtype: torch_outputs(torch_module(inspection, dtype), images, list(parts)),
            lambda dtype: flax_outputs(model, variables, dtype, images, list(parts)),
        )
        exact = [run('float64') for run in runs]
        rounded = exact if dtype == 'float64' else [run(dtype) for run in runs]
        outputs = [exact[0], rounded[0], exact[1], rounded[1]]
        rows = [
            compare(name, label, OUTPUT_LIMIT, dtype, *(each[name] for each in outputs))
            for name, label in parts.items()
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
                compare(
                    name, f'gradient of {name}', GRADIENT_LIMIT, dtype, *(side[name] for side in sides), scale=scale
                )
                for name in sides[0]
            ]
        worst = images[rows[-1].worst[0]][None]
        why = explain(inspection, model, variables, dtype, images, rows, outputs)
        maps = attention_maps(inspection, model, variables, worst) if attention else {}
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
        logits=Sides(*(each[''] for each in outputs)),
        inputs=images,
        seed=None if given else seed,
        causes=why,
        attention=maps,
    )


def labels(model: nn.Module) -> dict[str, str]:
    """The parts that are compared, in the order they compute: PyTorch's names and what they are."""
    parts = {f'to_patch_embedding.{3 if model.patch_norm else 1}': 'patch embedding'}
    for block in range(model.depth):
        parts[f'transformer.layers.{block}.0'] = f'block {block} attention'
        parts[f'transformer.layers.{block}.1'] = f'block {block} feed-forward'
    return parts | {'to_latent': 'pooled features', '': 'logits' if model.num_classes else 'features'}


def explain(
    inspection: Inspection,
    model: nn.Module,
    variables: Mapping[str, Any],
    dtype: str,
    images: np.ndarray,
    rows: list[Row],
    outputs: list[dict[str, np.ndarray]],
) -> list[str]:
    """Why the first wrong part is wrong, on the image where it is most so. `outputs`: the fields of Sides, by name."""
    row = next((row for row in rows if not row.right), None)
    if row is None:
        table = table_difference(model) if isinstance(model, SimpleViT) else (0.0, 0.0)
        found = table_causes(model, model.pos_embedding(), table[1]) if table[0] > table[1] else []
        return [f'sincos table: {cause}' for cause in found]
    sides = Sides(*(each[row.name] for each in outputs))
    if not np.isfinite(sides.truth).all():
        return [f"{row.label}: PyTorch's own output is not finite; the weights or the images hold NaN or infinity"]
    output, run_in = (sides.port, dtype) if row.exact <= row.limit else (sides.exact, 'float64')
    worst = np.abs(output - sides.truth).reshape(len(images), -1).max(axis=1).argmax()
    today = {inspection.layout.to_today(name): tensor for name, tensor in inspection.tensors.items()}
    truth = {name: array[worst] for name, array in outputs[0].items()}
    truth = {name: truth[name] for name in labels(inspection.model)}  # in computing order
    found = causes(inspection.model, today, images[worst], truth, row.name, output[worst], variables, run_in)
    return [f'{row.label}: {cause}' for cause in found]


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


def attention_maps(
    inspection: Inspection, model: nn.Module, variables: Mapping[str, Any], image: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """PyTorch's and the port's attention maps in float64, each (heads, queries, keys): first, middle and last block.

    `image`: (1, height, width, channels). DeepViT has two a block, before and after re-attention.
    """
    kinds = {'': ('attend', 'attend')}  # PyTorch's module that puts out the map, and ours
    if isinstance(inspection.model, DeepViT):
        kinds = {
            ', before re-attention': ('dropout', 'attention_dropout'),
            ', after re-attention': ('reattn_norm.1', 'reattn_norm.1'),  # PyTorch's has the heads last
        }
    depth = inspection.model.depth
    names = {
        f'block {block}{kind}': [f'transformer.layers.{block}.0.{module}' for module in modules]
        for block in sorted({0, depth // 2, depth - 1})
        for kind, modules in kinds.items()
    }
    theirs = torch_outputs(torch_module(inspection, 'float64'), image, [name for name, _ in names.values()])
    whole = model.clone(query_chunk_size=None)  # for maps that are held at once
    ours = flax_outputs(whole, variables, 'float64', image, [name for _, name in names.values()])

    def heads_first(name: str, attention: np.ndarray) -> np.ndarray:
        return np.moveaxis(attention, -1, 0) if 'norm' in name else attention

    return {label: (heads_first(their, theirs[their][0]), ours[our][0]) for label, (their, our) in names.items()}


def cast(tree: Any, dtype: str) -> Any:
    """Every array of the tree in `dtype`; one program for all of them compiles sooner than one for each shape."""
    return jax.jit(lambda tree: jax.tree.map(lambda array: jnp.asarray(array, dtype), tree))(tree)


def compare(name: str, label: str, limit: float, dtype: str, *outputs: np.ndarray, scale: float = 0.0) -> Row:
    """The row of an output, given PyTorch's in float64 and in `dtype`, the port's in float64 and in `dtype`.

    Errors are relative to the output's size, or to `scale` where that is more.
    """
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
        ratio_limit=ratio_limit(truth.size),
        floor=FLOOR.get(dtype, limit),
    )


def ratio_limit(numbers: int) -> float:
    """What the root mean square of the port's errors over that of PyTorch's may be, each taken from so many numbers.

    `RATIO`, but of few numbers the ratio is itself uncertain: its square, over that of the true ratio, has the F
    distribution. From 51 numbers down chance would too often lift a right port's ratio above `RATIO`.
    """
    from scipy.special import fdtri

    return max(RATIO, USUAL_RATIO * float(fdtri(numbers, numbers, 1 - FALSE_ALARMS)) ** 0.5)
