"""The port against outputs that PyTorch gave earlier, where there is neither torch nor vit-pytorch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from convert import checkpoint
from convert.errors import ConversionError
from convert.parity import FLOOR, OUTPUT_LIMIT, Report, Row, compare, flax_outputs, ratio_limit
from flax_vit import SimpleViT, from_pretrained
from flax_vit.pretrained import read_golden

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
    with jax.enable_x64(True):
        model, variables = from_pretrained(folder)
        ours = {dtype: logits(model, variables, golden['images'], dtype) for dtype in ('float64', 'float32')}
    sides = golden['float64'], golden['float32'], ours['float64'], ours['float32']
    return compare('', 'logits', OUTPUT_LIMIT, 'float32', *sides)


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
    if len(images) != 4 or logits[0] != logits[1] or images[:1] != logits[0][:1]:
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
    port's own are (more, if they are fewer than 52 numbers). In float64 the limit is rounding (but a SimpleViT's
    position table is float32 even there). When they are further, every field that the weights leave open is tried with
    other values.
    """
    dtype = 'float32' if reference.dtype == np.float64 and isinstance(model, SimpleViT) else reference.dtype.name
    with jax.enable_x64(True):
        exact = logits(model, variables, images, 'float64')
        if exact.shape != reference.shape:
            raise ConversionError(f'The saved outputs have the shape {reference.shape}, the model gives {exact.shape}.')
        limit = OUTPUT_LIMIT
        if dtype != 'float64':
            own = _distance(logits(model, variables, images, dtype), exact)
            limit = max(ratio_limit(reference.size) * own, FLOOR[dtype])
        difference = _distance(reference, exact)
        causes = []
        if difference > limit:
            changes = list(alternatives(model))
            fitting = (
                change
                for change in changes
                if _distance(reference, logits(model.clone(**change), variables, images, 'float64')) <= limit
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


def logits(model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, dtype: str) -> np.ndarray:
    """The port's outputs in `dtype`, as float64."""
    return flax_outputs(model, variables, dtype, images, [''])['']


def alternatives(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Other values of the fields that weights can't tell, which take the same weights."""
    inner_dim = model.heads * model.dim_head
    if isinstance(model, SimpleViT):
        for heads in range(1, inner_dim + 1):
            if inner_dim % heads == 0 and heads != model.heads:
                yield {'heads': heads, 'dim_head': inner_dim // heads}
    else:
        yield {'pool': 'mean' if model.pool == 'cls' else 'cls'}


def _in_words(model: nn.Module, change: Mapping[str, Any]) -> str:
    (name, value), *_ = change.items()
    return f'matches if {name}={value!r} instead of {getattr(model, name)!r}'


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `other`."""
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)))
