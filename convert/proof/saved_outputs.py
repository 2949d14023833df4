"""The port against outputs that PyTorch gave earlier, where there is neither torch nor vit-pytorch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from convert.architectures import architecture_of
from convert.errors import ConversionError
from convert.files import checkpoint
from convert.proof.flax_side import FlaxSide
from convert.proof.measure import FLOOR, OUTPUT_LIMIT, Row, Sides, compare, moved, relative, settled, size
from convert.proof.parity import Report
from flax_vit import from_pretrained
from flax_vit.folders.pretrained import read_golden
from flax_vit.parameters import reads_channels_last

GOLDEN = ('images', 'float64', 'float32')  # the images, and PyTorch's outputs for them in these dtypes


@dataclass(frozen=True)
class Comparison:
    """How far the port is from outputs that were saved, and which field would mend it. Errors are relative."""

    difference: float  # of the saved outputs from the port in float64
    limit: float  # what that may be
    agreement: float  # the share of images for which both predict the same class
    images: int
    causes: list[str]

    @property
    def right(self) -> bool:
        return self.difference <= self.limit


def golden_of(report: Report) -> dict[str, np.ndarray]:
    """What a folder keeps of a report, to be compared with anywhere: images, and PyTorch's outputs for them."""
    return {'images': report.inputs, 'float64': report.logits.truth, 'float32': report.logits.torch}


def recheck(folder: Path) -> Row:
    """Hold the model in a folder, on this machine, against the outputs of PyTorch that were kept there.

    The weights are those that were verified: `from_pretrained` checks their hash. Raises ConversionError when the
    folder keeps no outputs.
    """
    golden = load_golden(folder)
    images = golden['images']
    with jax.enable_x64(True):
        model, variables = from_pretrained(folder)
        flax = FlaxSide(reads_channels_last(model), variables)
        exact, ours = (flax.outputs(dtype, images, [''])[''] for dtype in ('float64', 'float32'))

        def again(run: int) -> list[Row]:
            """PyTorch cannot run again: what moving the images changes stands for its rounding."""
            other = moved(images, 'float32', run)
            truth, port = (flax.outputs(dtype, other, [''])[''] for dtype in ('float64', 'float32'))
            row = compare('', 'logits', OUTPUT_LIMIT, 'float32', Sides(truth, exact, truth, port))
            return [replace(row, exact=math.inf)]  # float64 it cannot acquit

        row = compare('', 'logits', OUTPUT_LIMIT, 'float32', Sides(golden['float64'], golden['float32'], exact, ours))
        return settled([row], again)[0]


def load_golden(folder: Path) -> dict[str, np.ndarray]:
    """What `golden_of` gave, out of a folder. Raises ConversionError when it keeps nothing of the kind."""
    golden = read_golden(folder)
    if not golden:
        raise ConversionError(
            f'{folder} keeps no outputs of PyTorch to compare with. Give the checkpoint as well (flax-vit verify '
            'CHECKPOINT OUT), or convert with --verify, which keeps them.'
        )
    shapes = {name: golden[name].shape if name in golden else () for name in GOLDEN}
    images, *logits = shapes.values()
    if len(images) not in (3, 4) or logits[0] != logits[1] or images[:1] != logits[0][:1]:
        found = ', '.join(f'{name} {array.shape}' for name, array in golden.items())
        raise ConversionError(
            f'{folder} keeps {found}, and not what convert --verify does: {", ".join(GOLDEN)}, one row for each image.'
        )
    return golden


def compare_outputs(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, reference: np.ndarray
) -> Comparison:
    """Hold the port against `reference`, PyTorch's outputs (batch, classes) for `images`, in the dtype they ran in.

    PyTorch rounds as the port does in that dtype, so the outputs may be 3 times as far from the port in float64 as the
    port's own are, of several runs at most. In float64 the limit is rounding (but a computed position table is
    float32 even there). When they are further, every field that the weights leave open is tried with other values.
    """
    architecture = architecture_of(model)
    computed = architecture.model.POSITIONS is None  # in float32, whatever the rest is in
    dtype = 'float32' if reference.dtype == np.float64 and computed else reference.dtype.name
    with jax.enable_x64(True):
        flax = FlaxSide(model, variables)
        exact = flax.outputs('float64', images, [''])['']
        if exact.shape != reference.shape:
            raise ConversionError(f'The saved outputs have the shape {reference.shape}, the model gives {exact.shape}.')
        difference, limit = _distance(reference, exact), OUTPUT_LIMIT
        if dtype != 'float64':

            def again(run: int) -> list[Row]:
                other = moved(images, dtype, run)
                there, port = (flax.outputs(each, other, [''])[''] for each in ('float64', dtype))
                return [row(max(_distance(port, there), _distance(exact, there)))]

            def row(rounding: float) -> Row:
                return Row('', 'logits', 0.0, (), difference, rounding, OUTPUT_LIMIT, FLOOR[dtype])

            own = _distance(flax.outputs(dtype, images, [''])[''], exact)
            limit = settled([row(own)], again)[0].port_limit
        causes = []
        if difference > limit:
            changes = list(architecture.alternatives(model))
            fitting = (
                change
                for change in changes
                if _distance(reference, FlaxSide(model.clone(**change), variables).outputs('float64', images, [''])[''])
                <= limit
            )
            change = next(fitting, None)
            causes = [_in_words(model, change) if change else f'none of {len(changes)} other values of its fields fits']
    agreement = float(np.mean(exact.argmax(axis=-1) == reference.argmax(axis=-1)))
    return Comparison(difference, limit, agreement, len(images), causes)


def load_outputs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` and `logits` of an .npz that was saved beside PyTorch. Raises ConversionError for any other file."""
    needed = "numpy.savez('outputs.npz', images=images.numpy(), logits=model(images).detach().numpy())"
    try:
        found = checkpoint.read(path).tree
    except ConversionError as error:
        raise ConversionError(f'The outputs should be an .npz, of {needed}. {error}') from error
    if not isinstance(found, Mapping) or not {'images', 'logits'} <= set(found):
        names = ', '.join(map(str, found)) if isinstance(found, Mapping) else f'a {type(found).__name__}'
        raise ConversionError(f'{path} holds {names or "nothing"}; images and logits are needed: {needed}.')
    images, reference = found['images'], found['logits']
    for name, array in (('images', images), ('logits', reference)):
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise ConversionError(
                f'{path}: {name} must be an array of numbers, not {getattr(array, "name", type(array).__name__)}.'
            )
    if reference.ndim != 2 or len(images) != len(reference) or reference.dtype.name not in {*FLOOR, 'float64'}:
        raise ConversionError(
            f'{path}: logits must be floats (batch, classes), one row for each image; they are {reference.dtype} '
            f'{reference.shape}, for images {images.shape}.'
        )
    return images, reference


def _in_words(model: nn.Module, change: Mapping[str, Any]) -> str:
    (name, value), *_ = change.items()
    return f'matches if {name}={value!r} instead of {getattr(model, name)!r}'


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `other`."""
    return relative(size(one - other), size(other))
