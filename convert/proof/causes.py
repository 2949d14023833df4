"""Why a part of the port differs from PyTorch: each known mistake in turn is held against what the port computed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from convert.architectures import architecture_of
from convert.architectures.way import Mistake, Way, part_inputs, short
from convert.proof.measure import relative, size
from convert.proof.mistakes import mistakes, rounding_mistakes
from convert.recognition.names import leaf

# The right cause leaves what two float64 runs of one formula differ by: at most 1e-12 (`verify`'s own limit), and a few
# times that where a mistake makes the formula ill-conditioned. The mildest of the mistakes, an epsilon of 1e-6, moves a
# part of variance 1 by 5e-6. Between the two there is room on both sides.
FITS = 1e-9
# Where the part hardly depends on the mistake (an epsilon beside a variance of 1e4), it must also do away with most of
# what is wrong.
BETTER = 1e-2
# A cause that is itself rounding repeats only in part, numpy and XLA not rounding alike: it must explain half.
EXPLAINS = 0.5
# Cancellation does not repeat at all: its size must agree, within this factor.
SAME_SIZE = 4.0


def causes(
    model: nn.Module,
    tensors: Mapping[str, np.ndarray],
    images: np.ndarray,
    truth: Mapping[str, np.ndarray],
    part: str,
    worst: int,
    output: np.ndarray,
    variables: Mapping[str, Any] | None = None,
    dtype: str = 'float64',
) -> list[str]:
    """Why the port's output of a part is not PyTorch's, in words; more than one where they cannot be told apart.

    `model`: the right one. `tensors`: the source's, by today's names. `images` (batch, height, width, channels) and
    `truth`, PyTorch's outputs for them in float64, by part in computing order. `output`: the port's for the image
    `worst`, computed in `dtype`. `variables`: the port's, for a look whether they are the source's. Whatever is before
    the part is right.
    """
    kind = architecture_of(model).way
    right_output = truth[part][worst]
    if kind is None:
        return [f'no mistakes are known of a {type(model).__name__}: it is {compared(output, right_output)}']
    with np.errstate(all='ignore'):  # a mistake may well overflow
        way = kind.for_part(model, tensors, part)
        batch = [
            part_inputs(way, image, {name: outputs[number] for name, outputs in truth.items()}, part)
            for number, image in enumerate(images)
        ]
        inputs = batch[worst]
        way = replace(way, batch=[way.joined(part, each) for each in batch])

        def known() -> Iterator[Mistake]:
            """Anew each time: of a large model all mistakes' tensors together are many gigabytes."""
            return mistakes(way, part, len(right_output))

        found, ours = wrong_parameters(way, part, known(), variables or {})
        if found:
            if any(tensor.shape != way.tensors[name].shape for name, tensor in ours.items()):
                return found
            way = replace(way, tensors={**way.tensors, **ours})
        right = way.compute(part, inputs)
        before = error(output, right)
        if found and before <= FITS:
            return found

        def fitting(candidates: Iterable[Mistake]) -> list[str]:
            limit = min(FITS, BETTER * before)
            return [
                f'matches {mistake.words}'
                for mistake in candidates
                if error(output, mistake.applied(way).compute(part, inputs)) <= limit
            ]

        # Whoever took a framework's default once did so wherever there is one.
        default = next((each for each in known() if each.default), None)
        pairs = (default.and_also(each) for each in known() if each.words != default.words) if default else ()
        fit = fitting(known()) or fitting(pairs) or _rounding(way, part, inputs, output, dtype)
        count = sum(1 for _ in known())
        return found + (fit or [f'none of the {count} known mistakes fits: it is {compared(output, right_output)}'])


def table_causes(model: Any, limit: float) -> list[str]:
    """Why a table of positions that are no parameters is not PyTorch's to within `limit`."""
    table, right, wrong = architecture_of(model).table_and_mistakes(model)
    fit = [f'matches {words}' for words, mistaken in wrong.items() if np.abs(table - mistaken).max() <= limit]
    return fit or [f'no known mistake fits: it is {compared(table, right)}']


def wrong_parameters(
    way: Way, part: str, known: Iterable[Mistake], variables: Mapping[str, Any]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """In words, which of the part's parameters are not the source's bit for bit; and these, by name, as the port's."""
    found: dict[str, np.ndarray] = {}
    last_place = 0.0  # twice that of the port's own dtype, which may have rounded besides
    for path, array in flatten_dict(variables).items():
        rule = leaf(path, np.ndim(array))
        if rule.name.startswith(way.owned(way.model, part)):
            found[rule.name] = np.asarray(rule.to_torch(np.asarray(array)), np.float64)
            last_place = max(last_place, 2 * float(ml_dtypes.finfo(array.dtype).eps))
    wrong = {
        name: ours
        for name, ours in way.in_matrices(found).items()
        if name in way.tensors and not np.array_equal(ours, way.tensors[name], equal_nan=True)
    }
    errors: dict[str, dict[str, float]] = {name: {} for name in wrong}
    for each in known if wrong else ():
        for name in wrong.keys() & each.tensors.keys():
            errors[name][each.words] = error(wrong[name], each.tensors[name])
    reasons: dict[str, list[str]] = {}
    for name, ours in wrong.items():
        fit = [words for words, rest in errors[name].items() if rest == 0]
        fit = fit or [words for words, rest in errors[name].items() if rest <= last_place]
        reason = f'matches {" or ".join(fit)}' if fit else compared(ours, way.tensors[name])
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        called = [short(name, part) for name in names]
        called = called if len(called) < 4 else [*called[:2], f'{len(called) - 2} more']
        largest = max(difference(wrong[name], way.tensors[name]) for name in names)
        lines.append(f"{', '.join(called)}: not the source's, at most {largest:.1e} apart; {reason}")
    return lines, wrong


def _rounding(way: Way, part: str, inputs: Sequence[np.ndarray], output: np.ndarray, dtype: str) -> list[str]:
    """The roundings that explain most of the error; failing that, those that make errors of its size."""
    right = way.compute(part, inputs)
    if output.shape != right.shape:
        return []
    whole = size(output - right)
    wrong = {mistake: mistake.applied(way).compute(part, inputs) for mistake in rounding_mistakes(dtype)}
    left = {mistake.words: size(output - each) for mistake, each in wrong.items()}
    best = min(left.values(), default=np.inf)
    if best <= EXPLAINS * whole:
        return [f'matches with {words}' for words, rest in left.items() if rest <= 1.1 * best]
    # Those that repeat would have fitted: with them, the same size is chance.
    sizes = {mistake.words: size(each - right) for mistake, each in wrong.items() if not mistake.repeats}
    same = [words for words, expected in sizes.items() if whole / SAME_SIZE <= expected <= SAME_SIZE * whole]
    return [f'the error has the size that comes of {" or ".join(same)}'] if same else []


def compared(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far two arrays are apart, and whether something simple lies between them."""
    if ours.shape != theirs.shape:
        return f'of shape {ours.shape} instead of {theirs.shape}'
    if not np.isfinite(ours).all():
        return f'not finite in {np.sum(~np.isfinite(ours))} of {ours.size} places'
    factor = float((ours * theirs).sum() / (theirs * theirs).sum()) if theirs.any() else 0.0
    if error(ours, factor * theirs) <= FITS and factor:
        return f"the source's times {factor:.6g}"
    if not ours.any():
        return 'zero everywhere'
    if error(np.sort(ours, axis=None), np.sort(theirs, axis=None)) <= FITS:
        return "the source's values in another order"
    ratio = size(ours) / size(theirs) if theirs.any() else np.inf
    return (
        f"{np.abs(ours - theirs).max():.1e} from the source's at most, {size(ours - theirs) / (size(theirs) or 1):.1e} "
        f'of its size on the whole, and {ratio:.4g} times as large'
    )


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return relative(difference(ours, theirs), float(np.abs(theirs).max()))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest; infinite where the shapes differ."""
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf
