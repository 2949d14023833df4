"""The parity report: PyTorch and Flax side by side on the same images, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from convert.architectures import architecture_of
from convert.architectures.architecture import ComputedTable, Field
from convert.conversion import Inspection, inspect, place
from convert.errors import ConversionError, with_article
from convert.proof.causes import causes, table_causes
from convert.proof.flax_side import FlaxSide
from convert.proof.measure import GRADIENT_LIMIT, OUTPUT_LIMIT, RATIO, SMALLEST, Row, Sides, compare, moved, settled
from convert.proof.numpy_side import NumpySide
from convert.proof.torch_side import TorchSide
from convert.recognition.names import differences, leaf
from flax_vit.architectures import name_of
from flax_vit.checks import TRAINING, floating_dtype
from flax_vit.looking import with_whole_maps
from flax_vit.parameters import check_variables, input_shape, reads_channels_last
from flax_vit.stacking import is_stacked, one_by_one, unstack_layers


@dataclass(frozen=True, repr=False)
class Report:
    """What was compared, and whether the port is right."""

    inspection: Inspection  # a field that nobody gave and the weights don't tell is 'assumed'
    dtype: str  # what was compared beside float64
    images: int  # how many
    rows: list[Row]  # of the outputs of each part, in the order they are computed; the last is the whole model's
    gradients: list[Row]  # of each parameter, when asked for
    table: ComputedTable | None  # of positions that are no parameters
    predictions: np.ndarray  # the port's classes, in the compared dtype
    agreement: float  # the share of images for which PyTorch predicts the same
    logits: Sides  # each (batch, classes)
    inputs: np.ndarray  # the images
    seed: int | None  # of random images; None where images were given
    causes: list[str]  # why the first wrong part is wrong, in words; empty when all outputs are right
    attention: Mapping[str, tuple[np.ndarray, np.ndarray]]  # of one image: PyTorch's map and the port's, when asked for
    rounded: str  # 'bfloat16' where the converted parameters are the source's rounded to it, and both sides have them

    @property
    def truth(self) -> str:
        """What the port is compared with: 'PyTorch', or whose model it is where numpy computes it."""
        return architecture_of(self.inspection.model).truth

    @property
    def criterion(self) -> str:
        """When a port is right, in words."""
        gradients = f', and of every gradient at most {GRADIENT_LIMIT:.0e}' if self.gradients else ''
        text = f'right when in float64 the difference of every part is at most {OUTPUT_LIMIT:.0e}{gradients}'
        if self.dtype != 'float64':
            text += (
                f', and in {self.dtype} the Flax model is at most {RATIO:.0f} times as far from the float64 truth as '
                f'{self.truth} itself, in one of as many runs as it takes to rule out chance'
            )
        return f'{text}. All relative to the size of what is compared.'

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits, of which the largest is the prediction."""
        return bool(getattr(self.inspection.model, 'num_classes', 0))

    @property
    def table_right(self) -> bool:
        """Whether positions that are no parameters are PyTorch's."""
        return self.table is None or self.table.right

    @property
    def right(self) -> bool:
        """Whether the port is, in all that was compared."""
        return self.table_right and all(row.right for row in self.rows + self.gradients)

    @property
    def runs(self) -> int:
        """How often both sides ran in `dtype`."""
        return self.rows[0].runs

    @property
    def first(self) -> Row | None:
        """The first part that is wrong; None where all are right, or only the table is not."""
        wrong = [row for row in self.rows + self.gradients if not row.right]
        return next((row for row in wrong if not row.same_function), wrong[0] if wrong else None)

    @property
    def verdict(self) -> str:
        """In a sentence, after RIGHT or WRONG."""
        if self.first is None:
            if self.table and not self.table.right:
                return f'the {self.table.name} is not that of {self.truth}.'
            weights = f', with the parameters rounded to {self.rounded}' if self.rounded else ''
            assumed = self.inspection.assumed(TRAINING)
            if not assumed:
                return f'the Flax model computes what {self.truth} does{weights}.'
            return (
                f'the Flax model computes what {self.truth} does{weights}, if {assumed}: both sides '
                'assume that, and it cannot be inferred from the weights. Pass what you know as arguments, or '
                'compare with outputs of your own model (--reference).'
            )
        if self.first.same_function and self.table_right:
            return (
                f'the same function, computed too coarsely: in float64 both agree, but in {self.dtype} '
                f'{self.first.label} is {self.first.ratio:.3g} times as far from the truth as {self.truth}, in the '
                f'best of {self.runs} run{"s" if self.runs > 1 else ""}; rounding explains at most {RATIO:.0f} times.'
            )
        where = self.first.label
        return f'the Flax model does not compute what {self.truth} does. The first difference is in: {where}.'

    def __repr__(self) -> str:
        causes = ''.join(f' {cause}.' for cause in self.causes)
        return f'<Report: {"RIGHT" if self.right else "WRONG"}: {self.verdict}{causes}>'


def verify(
    source: Any,
    *,
    converted: tuple[nn.Module, Mapping[str, Any]] | None = None,
    images: Any = None,
    count: int = 8,
    seed: int = 0,
    dtype: Any = 'float32',
    gradients: bool = False,
    attention: bool = False,
    key: str | None = None,
    part: str | None = None,
    release: str | None = None,
    **overrides: Any,
) -> Report:
    """Run vit-pytorch's module and the Flax model on the same images, in float64 and in `dtype`; compare every block.

    The Flax model runs at the highest precision of matrix products. What big_vision trained is held against its forward
    pass in numpy, which needs no torch but for gradients.

    Args:
        source: A path, a state dict or a live torch.nn.Module, as of `inspect`.
        converted: The model and variables to verify; without them, `source` is converted. Where neither the weights
            nor `overrides` tell a field, both sides have the converted model's. Where its parameters have another
            dtype than the source's, PyTorch's are rounded to it as well.
        images: Floating-point numbers (batch, height, width, channels) or (batch, channels, height, width).
        count: Without `images`, so many random ones are drawn,
        seed: from this seed.
        dtype: What is compared beside float64, the name or the type: 'float32', 'bfloat16' or 'float16'.
        gradients: Whether those of every parameter are compared, too.
        attention: Whether to keep the attention maps of the image whose logits differ most.
        key: Which of several models in the source, by its address.
        part: 'transformer' for the Transformer alone; it takes tokens (batch, tokens, dim) for images.
        release: The vit-pytorch that wrote it, as of `inspect`.
        **overrides: Fields of the Flax model that the weights don't tell.

    Returns:
        What was compared: a row for each part, the verdict, and why the first wrong part is wrong.

    Raises:
        ConversionError: When torch or vit-pytorch is missing, or `converted` does not fit the source.
        OSError: When the source cannot be read; FileNotFoundError when it is not there.
        ValueError: For images that don't fit, or another dtype.
    """
    dtype = floating_dtype('dtype', dtype).name
    if converted:
        inspection = with_shared_fields(source, converted[0], key=key, part=part, release=release, **overrides)
    else:
        inspection = inspect(source, key=key, part=part, release=release, **overrides)
    random = np.random.default_rng(seed)
    given = images is not None
    with jax.enable_x64(True):
        model, variables = converted or (inspection.model, place(inspection))
        if is_stacked(model):  # for blocks that have a name each
            model, variables = one_by_one(model), unstack_layers(variables)
        tensors, rounded = tensors_as_converted(inspection, model, variables)
        if given:
            images = channels_last(model, variables, images)
        else:
            images = random.standard_normal((count, *input_shape(inspection.model)), np.float32)
        model = reads_channels_last(model)
        side = TorchSide if architecture_of(model).truth == 'PyTorch' else NumpySide
        torch, flax = side(inspection, tensors), FlaxSide(model, variables)
        logits = jax.eval_shape(model.apply, variables, images)
        weights = random.standard_normal(logits.shape) if gradients else None
        outputs, rows = measured(torch, flax, images, weights, dtype)
        rows, gradient_rows = rows[: len(outputs)], rows[len(outputs) :]
        worst = images[rows[-1].worst[0]][None]
        why = explain(torch, flax, dtype, images, rows, outputs)
        maps = attention_maps(torch, flax, worst) if attention else {}
    predictions = outputs[''].port.argmax(axis=-1)
    return Report(
        inspection,
        dtype,
        len(images),
        rows,
        gradient_rows,
        table=architecture_of(model).table(model),
        predictions=predictions,
        agreement=float(np.mean(predictions == outputs[''].torch.argmax(axis=-1))),
        logits=outputs[''],
        inputs=images,
        seed=None if given else seed,
        causes=why,
        attention=maps,
        rounded=rounded,
    )


def measured(
    torch: TorchSide, flax: FlaxSide, images: np.ndarray, weights: np.ndarray | None, dtype: str
) -> tuple[dict[str, Sides], list[Row]]:
    """The outputs of the parts, and a row for each, and for each gradient of the sum of weights x logits."""

    def again(run: int) -> list[Row]:
        tensors = {name: moved(tensor, dtype, run, name) for name, tensor in torch.tensors.items()}
        moves = {name: np.subtract(tensors[name], tensor, dtype=np.float64) for name, tensor in torch.tensors.items()}
        other = None if weights is None else moved(weights, dtype, run, 'weights')
        sides = type(torch)(torch.inspection, tensors), flax.moved(moves)
        return measured_once(*sides, moved(images, dtype, run, 'images'), other, dtype)[1]

    outputs, rows = measured_once(torch, flax, images, weights, dtype)
    return outputs, settled(rows, again)


def measured_once(
    torch: TorchSide, flax: FlaxSide, images: np.ndarray, weights: np.ndarray | None, dtype: str
) -> tuple[dict[str, Sides], list[Row]]:
    """Likewise, of a single run."""

    def sides(run: str, argument: Any) -> dict[str, Sides]:
        truth, exact = (getattr(side, run)('float64', images, argument) for side in (torch, flax))
        theirs, ours = truth, exact
        if dtype != 'float64':
            theirs, ours = (getattr(side, run)(dtype, images, argument) for side in (torch, flax))
        return {name: Sides(truth[name], theirs[name], exact[name], ours[name]) for name in truth}

    parts = labels(torch.inspection.model)
    outputs = sides('outputs', list(parts))
    rows = [compare(name, label, OUTPUT_LIMIT, dtype, outputs[name]) for name, label in parts.items()]
    if weights is not None:
        gradients = sides('gradients', weights)
        scale = SMALLEST * max(np.abs(each.truth).max() for each in gradients.values())
        rows += [
            compare(name, f'gradient of {name}', GRADIENT_LIMIT, dtype, each, scale=scale)
            for name, each in gradients.items()
        ]
    return outputs, rows


def with_shared_fields(source: Any, model: nn.Module, **arguments: Any) -> Inspection:
    """The inspection of a source, with a converted model's fields where nothing else tells them: assumed, in both.

    Raises ConversionError when the model is none of this source.
    """
    inspection = inspect(source, **arguments)
    ours, theirs = (name_of(each) for each in (type(model), inspection.layout.model))
    if ours != theirs:
        raise ConversionError(
            f'The converted model is {with_article(ours)}, but {inspection.source} holds {with_article(theirs)}.'
        )
    shared = {name for name, field in inspection.fields.items() if field.how in {'unknown', 'assumed'}}
    inspection = inspect(source, **arguments, **{name: getattr(model, name) for name in shared})
    fields = {
        name: Field(field.value, 'assumed', 'as the converted model has it') if name in shared else field
        for name, field in inspection.fields.items()
    }
    return replace(inspection, fields=fields)


def tensors_as_converted(
    inspection: Inspection, model: nn.Module, variables: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], str]:
    """The source's tensors by today's names, in the dtypes that the converted parameters have; and which these are.

    Empty where no tensor is rounded. Raises ConversionError when the variables are not of the source's shapes, and
    ValueError when they are none of the model.
    """
    check_variables(model, variables)
    rules = {leaf(path, array.ndim): array for path, array in flatten_dict(variables).items()}
    ours = {
        rule.name: jax.ShapeDtypeStruct(rule.torch_shape(array.shape), array.dtype) for rule, array in rules.items()
    }
    tensors = inspection.layout.tensors_of_today(inspection.tensors)
    theirs, common = inspection.model, [name for name in tensors if name in ours]
    misshapen = any(tensors[name].shape != ours[name].shape for name in common)
    if misshapen or labels(model) != labels(theirs):
        shapes, found = ({name: each[name].shape for name in each} for each in (tensors, ours))
        raise ConversionError(
            f'The converted model is none of {inspection.source}: is it of another file, or was it converted with '
            'other fields, say num_classes=0? What only the source has (-), and only the model (+):\n'
            + '\n'.join(differences(shapes, found))
        )
    rounded = set()
    for name in common:
        if jnp.promote_types(ours[name].dtype, tensors[name].dtype) != ours[name].dtype:
            tensors[name] = np.asarray(jnp.asarray(tensors[name], ours[name].dtype))
            rounded.add(ours[name].dtype.name)
    return tensors, ' and '.join(sorted(rounded))


def channels_last(model: Any, variables: Mapping[str, Any], images: Any) -> np.ndarray:
    """Images of either order of axes as (batch, height, width, channels), in float32 or float64; tokens as they are.

    Raises ValueError when they don't fit the model.
    """
    images = np.asarray(images)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    jax.eval_shape(model.apply, variables, shape)  # raises it
    try:
        jax.eval_shape(reads_channels_last(model).apply, variables, shape)
        first = getattr(model, 'image_format', None) == 'channels_first'
    except ValueError:
        first = True
    images = np.moveaxis(images, 1, 3) if first else images
    # a copy: JAX's arrays can't be written to, which PyTorch warns of
    return np.array(images, np.promote_types(images.dtype, np.float32), order='C')


def labels(model: nn.Module) -> dict[str, str]:
    """The parts that are compared, in the order they compute: PyTorch's names and what they are."""
    return architecture_of(model).parts(model)


def explain(
    torch: TorchSide, flax: FlaxSide, dtype: str, images: np.ndarray, rows: list[Row], outputs: Mapping[str, Sides]
) -> list[str]:
    """Why the first wrong part is wrong, on the image where it is most so."""
    row = next((row for row in rows if not row.same_function), next((row for row in rows if not row.right), None))
    if row is None:
        table = architecture_of(flax.model).table(flax.model)
        wrong = table_causes(flax.model, table.limit) if table and not table.right else []
        return [f'{table.name}: {cause}' for cause in wrong] if table else []
    sides = outputs[row.name]
    if not np.isfinite(sides.truth).all():
        return [f"{row.label}: the source's own output is not finite; the weights or the images hold NaN or infinity"]
    output, run_in = (sides.port, dtype) if row.same_function else (sides.exact, 'float64')
    worst = int(np.abs(output - sides.truth).reshape(len(images), -1).max(axis=1).argmax())
    model = torch.inspection.model
    truth = {name: outputs[name].truth for name in labels(model)}  # in computing order
    found = causes(model, torch.tensors, images, truth, row.name, worst, output[worst], flax.variables, run_in)
    return [f'{row.label}: {cause}' for cause in found]


def attention_maps(torch: TorchSide, flax: FlaxSide, image: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """PyTorch's and the port's attention maps in float64, each (heads, queries, keys): first, middle and last block.

    `image`: (1, height, width, channels).
    """
    depth, architecture = flax.model.depth, architecture_of(flax.model)
    maps = {
        f'block {block}{kind.words}': (f'{architecture.blocks}.{block}.0.', kind)
        for block in sorted({0, depth // 2, depth - 1})
        for kind in architecture.maps_of_block(flax.model, block)
    }
    if not maps:
        return {}
    theirs = torch.outputs('float64', image, [part + kind.torch for part, kind in maps.values()])
    whole = FlaxSide(with_whole_maps(flax.model), flax.variables)  # for maps that are held at once
    ours = whole.outputs('float64', image, [part + kind.flax for part, kind in maps.values()])
    both = {label: (theirs[part + kind.torch][0], ours[part + kind.flax][0]) for label, (part, kind) in maps.items()}
    last = {label for label, (_, kind) in maps.items() if kind.heads_last}
    return {label: (np.moveaxis(one, -1, 0) if label in last else one, other) for label, (one, other) in both.items()}
