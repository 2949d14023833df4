"""What people see in the terminal: tables, progress, verdicts."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from convert.command_line.console import err, out, show_facts
from convert.conversion import Inspection, notes
from convert.proof.measure import Row
from convert.proof.parity import Report
from convert.proof.saved_outputs import Comparison
from flax_vit.checks import COMPUTATION
from flax_vit.folders.config import origin


def show_inspection(inspection: Inspection) -> None:
    """What a source is, which fields its model has and how they are known, what is left aside."""
    warn_of(inspection)
    size = sum(tensor.nbytes for tensor in inspection.tensors.values())
    facts = {
        'source': f'{inspection.source} ({inspection.format})',
        'model': inspection.origin,
        'found at': inspection.unwrapped.address or 'the top',
        'parameters': f'{inspection.parameters:,} in {len(inspection.tensors)} tensors, {size:,} bytes',
        'dtype': ', '.join(inspection.dtypes),
    }
    facts |= {f'left aside: {group}': what for group, what in inspection.unwrapped.left_aside.items()}
    show_facts(facts)
    fields = Table('field', 'value', 'known by', 'because', box=None, pad_edge=False, title_justify='left')
    colours = {'assumed': 'yellow', 'unknown': 'red'}
    for name, field in inspection.fields.items():
        if name not in COMPUTATION or field.how == 'given':
            colour = colours.get(field.how, 'default')
            value = '?' if field.how == 'unknown' else str(field.value)
            fields.add_row(name, value, f'[{colour}]{field.how}[/]', escape(field.why))
    out.print(fields)


def warn_of(inspection: Inspection) -> None:
    """What the table of the fields says, where it is left out, and must be known all the same."""
    if out.quiet:
        for note in notes(inspection):
            err.print('[yellow]Warning:[/]', escape(note))


def show_plan(inspection: Inspection) -> None:
    """Every tensor, where it goes and what is done to it."""
    plan = Table('tensor', 'shape', 'dtype', 'Flax parameter', 'transform', box=None, pad_edge=False)
    for name, leaf in inspection.plan:
        tensor = inspection.tensors[name]
        shape = ' x '.join(map(str, tensor.shape))
        plan.add_row(escape(name), shape, str(tensor.dtype), leaf.place, leaf.transform)
    out.print()
    out.print(plan)


def show_converted(config: Mapping[str, Any]) -> None:
    """What a folder that `convert` wrote holds, and where it comes from."""
    fields = ', '.join(f'{name}={value!r}' for name, value in config['fields'].items() if value is not None)
    hashes = ', '.join(file['sha256'] for file in config['weights'])
    show_facts({'model': config['model'], 'fields': fields, 'sha256 of the weights': hashes})
    facts, verified = origin(config)
    facts |= {'verified': f'{verified["time"]}: {verified["verdict"]}'} if verified else {}
    for name, value in facts.items():
        shown = ', '.join(f'{key}: {item}' for key, item in value.items()) if isinstance(value, dict) else str(value)
        show_facts({f'source: {name}': shown})


def show_report(report: Report) -> None:
    """The errors of every part, and the verdict."""
    show_rows(report.rows, report.dtype, report.truth)
    if report.gradients:
        shown = [row for row in report.gradients if not row.right]
        shown = shown or sorted(report.gradients, key=lambda row: -row.exact)[:5]
        out.print(f'\ngradients of {len(report.gradients)} parameters; the {len(shown)} furthest apart:')
        show_rows(shown, report.dtype, 'PyTorch')
    if jax.default_backend() != 'cpu':
        out.print(f'on {jax.devices()[0].device_kind}, asking for the highest precision of matrix products')
    if report.table is not None:
        table = report.table
        out.print(f'{table.name}: at most {table.difference:.1e} from {table.truth} (limit {table.limit:.1e})')
    if report.classifies:
        out.print(f'same prediction in {report.dtype}: {report.agreement:.2%} of {report.images} images')
    out.print(verdict(report.right, report.verdict))
    for cause in report.causes:
        out.print(escape(f'  {cause}'))
    source = report.inspection.layout.source
    if source != 'vit-pytorch':
        what = 'PyTorch module' if report.truth == 'PyTorch' else 'forward pass in numpy'
        out.print(f"The {what} is this project's own version of {source}: docs/pretrained.md says how it is tested.")
    out.print(f'[dim]A port is {report.criterion}[/]')


def show_comparison(comparison: Comparison) -> None:
    """How far the port is from saved outputs, and the verdict."""
    out.print(
        f'the saved outputs are {comparison.difference:.1e} from the Flax model in float64; rounding explains '
        f'{comparison.limit:.1e}'
    )
    out.print(f'same prediction: {comparison.agreement:.2%} of {comparison.images} images')
    words = 'computes' if comparison.right else 'does not compute'
    out.print(verdict(comparison.right, f'the Flax model {words} what gave the saved outputs.'))
    for cause in comparison.causes:
        out.print(escape(f'  {cause}'))


def verdict(right: bool, words: str) -> str:
    """The verdict in a word, coloured, and its sentence."""
    return f'{"[green]RIGHT[/]" if right else "[red]WRONG[/]"}: {escape(words)}'


def show_rows(rows: list[Row], dtype: str, truth: str) -> None:
    """The errors of these parts, and those of what is the `truth` in float64."""
    table = Table(box=None, pad_edge=False)
    table.add_column('part')
    headings = [f'float64: Flax - {truth}']
    if dtype != 'float64':
        headings += [f'{dtype}: Flax', f'{dtype}: {truth}', 'ratio']
    for heading in (*headings, ''):
        table.add_column(heading, justify='right')
    for row in rows:
        figures = [f'{row.exact:.1e}', f'{row.port:.1e}', f'{row.torch:.1e}', f'{row.ratio:.2f}'][: len(headings)]
        table.add_row(row.label, *figures, '[green]right[/]' if row.right else '[red]WRONG[/]')
    out.print(table)


def track(items: Iterable[Any]) -> Iterator[Any]:
    """The items, with a progress bar from the second second on."""
    items = list(items)
    start = time.monotonic()
    with Progress(console=err, transient=True, auto_refresh=False, disable=not err.moves) as progress:
        task = progress.add_task('Placing parameters', total=len(items), visible=False)
        for item in items:
            yield item
            progress.update(task, advance=1, visible=time.monotonic() - start > 1)
            progress.refresh()
