"""The parity report for people, one HTML page, and for machines, JSON: the same figures in both."""

import errno
import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from convert.conversion import provenance
from convert.errors import ConversionError
from convert.proof.measure import GRADIENT_LIMIT, OUTPUT_LIMIT, RATIO, Row
from convert.proof.parity import Report
from convert.versions import versions
from flax_vit.checks import COMPUTATION
from flax_vit.folders.config import read_config
from flax_vit.folders.whole_files import appearing_whole

FORMAT = 'flax_vit report 1'


def check_target(target: Path, *, page: bool) -> None:
    """What would stop the writing of a report is better known before the models have run for an hour.

    Raises FileNotFoundError when there is no such folder, and ConversionError when a `page` lacks what draws it.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, 'No such folder for a report', str(target.parent))
    if page:
        try:
            import jinja2  # noqa: F401
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ConversionError(
                f"The page of a report needs matplotlib and jinja2 ({error}): pip install 'flax-vit[report]'."
            ) from error


def write_json(target: str | os.PathLike[str], figures: Mapping[str, Any]) -> None:
    """Write `figures` as JSON, whole or not at all; what is no finite number is the string NaN, Infinity, -Infinity."""
    check_target(Path(target), page=False)
    text = json.dumps(to_json(figures), indent=2, ensure_ascii=False, allow_nan=False)
    with appearing_whole(Path(target)) as partial:
        partial.write_text(text + '\n', encoding='utf-8', errors='backslashreplace')


def write_page(target: str | os.PathLike[str], report: Report, figures: Mapping[str, Any]) -> None:
    """Write the page of a report and its `figures`, whole or not at all: one file that loads nothing and runs nothing.

    Raises ConversionError when matplotlib or jinja2 is missing.
    """
    check_target(Path(target), page=True)
    from jinja2 import Environment, StrictUndefined

    from convert.proof import plots

    # What a page says of a checkpoint comes from strangers: file names, tensors' names, values. All of it is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name('report.html.j2').read_text(encoding='utf-8'))
    image = report.rows[-1].worst[0] if report.rows else 0
    page = template.render(figures, colours=plots.COLOURS, image=image, worst=_worst, **plots.draw(report, figures))
    with appearing_whole(Path(target)) as partial:
        partial.write_text(page, encoding='utf-8', errors='backslashreplace')  # a file's name may be any bytes


def figures_of(
    report: Report, *, command: str | None = None, images: str | None = None, converted: Path | None = None
) -> dict[str, Any]:
    """All figures of a report, in plain values; these keys stay, others may come.

    `command` ran it; `images` says where given ones are from; `converted` is the folder that was verified, if one was.

    - format, time (UTC), command
    - right; verdict and criterion in words; first: the label of the first part that is wrong, or null
    - truth: 'PyTorch', or whose model numpy computed: 'torch' below then stands for that
    - causes: why the two part, where that was found
    - limits: float64, gradients, ratio
    - source: name, files {name: sha256}, format, key, layout {id, wrote it}, dtypes, parameters, tensors,
      fields {name: {value, how, why}}, left aside {group: what}
    - rounded: null, or the dtype of the converted parameters that both sides are rounded to
    - converted: null, or the folder that was verified: folder, weights, sha256
    - run: dtype, runs in it, precision, seed (null: images were given), images, shape, from, devices, platform,
      versions {package: version}
    - parts, gradients: of each name, label, float64 (largest difference), limit, worst (its index), flax and torch
      (errors in `dtype`, root mean square against PyTorch in float64; of several runs the smallest of Flax and the
      largest of PyTorch), flax_limit, ratio, right; errors are relative
    - table: null, or of positions that are computed: name, difference, limit, truth
    - predictions: null without a head; or agreement (a share), flax, torch (class indices, of each image)
    - logits: smallest, largest (of the truth); of the differences from it the largest, flax and torch
    """
    inspection = report.inspection
    source = provenance(inspection)
    first = (
        None if report.right else report.first.label if report.first else report.table and f'the {report.table.name}'
    )
    truth, theirs, _, ours = report.logits
    head = report.classifies
    return {
        'format': FORMAT,
        'time': datetime.now(UTC).isoformat(timespec='seconds'),
        'command': command,
        'right': report.right,
        'verdict': report.verdict,
        'truth': report.truth,
        'criterion': report.criterion,
        'first': first,
        'causes': report.causes,
        'limits': {'float64': OUTPUT_LIMIT, 'gradients': GRADIENT_LIMIT, 'ratio': RATIO},
        'source': {
            'name': inspection.source,
            **{name: source[name] for name in ('files', 'format', 'key', 'layout', 'dtypes', 'left aside')},
            'parameters': inspection.parameters,
            'tensors': len(inspection.tensors),
            'fields': {
                name: {'value': plain(field.value), 'how': field.how, 'why': field.why}
                for name, field in inspection.fields.items()
                if name not in COMPUTATION
            },
        },
        'rounded': report.rounded or None,
        'converted': _folder(converted) if converted else None,
        'run': {
            'dtype': report.dtype,
            'precision': 'highest',
            'images': report.images,
            'runs': report.runs,
            'shape': list(report.inputs.shape),
            'seed': report.seed,
            'from': images or ('the caller' if report.seed is None else 'standard normal'),
            'devices': [f'{device.platform}: {device.device_kind}' for device in jax.devices()],
            'platform': f'{platform.platform()}, {platform.machine()}',
            'versions': versions(),
        },
        'parts': [_row(row) for row in report.rows],
        'gradients': [_row(row) for row in report.gradients],
        'table': report.table and report.table._asdict(),
        'predictions': {
            'agreement': report.agreement,
            'flax': report.predictions.tolist(),
            'torch': theirs.argmax(axis=-1).tolist(),
        }
        if head
        else None,
        'logits': {
            'smallest': float(truth.min()),
            'largest': float(truth.max()),
            'flax': float(abs(ours - truth).max()),
            'torch': float(abs(theirs - truth).max()),
        },
    }


def certificate(report: Report) -> dict[str, Any]:
    """The figures of a report that are kept with the converted weights."""
    figures = figures_of(report)
    kept = ('time', 'verdict', 'truth', 'criterion', 'run', 'parts', 'table', 'logits')
    return {name: figures[name] for name in kept}


def _row(row: Row) -> dict[str, Any]:
    return {
        'name': row.name,
        'label': row.label,
        'float64': row.exact,
        'limit': row.exact_limit,
        'worst': list(row.worst),
        'flax': row.port,
        'torch': row.torch,
        'flax_limit': row.port_limit,
        'ratio': row.ratio,
        'right': row.right,
    }


def _worst(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The row whose `key` is the largest; NaN is larger than anything."""
    return max(rows, key=lambda row: math.inf if math.isnan(row[key]) else row[key])


def _folder(folder: Path) -> dict[str, str]:
    weights = read_config(folder)['weights']
    names, hashes = (', '.join(file[key] for file in weights) for key in ('file', 'sha256'))
    return {'folder': str(folder), 'weights': names, 'sha256': hashes}


def plain(value: Any) -> Any:
    """A field's value in JSON: a dtype by its name, a size as a list."""
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def to_json(value: Any) -> Any:
    """Figures in JSON: what is no finite number is the string NaN, Infinity, -Infinity."""
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    return value
