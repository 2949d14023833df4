"""The tables of figures in docs/, made of the files in docs/figures; what a processor measured is a column.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`, and is never edited by hand.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / 'docs'
FIGURES = DOCS / 'figures' / 'processors'
CASE = ('model', 'size', 'batch', 'dtype', 'training')
ZEN = {'23': 'Zen 1 or 2', '25': 'Zen 3 or 4', '26': 'Zen 5'}  # by the family that the processor says
ORDER = {'model': ('ViT', 'SimpleViT', 'DeepViT'), 'size': ('README', 'Ti/16', 'S/16', 'B/16')}


def title(machine: Mapping[str, Any]) -> str:
    """What a machine is called: 'AMD EPYC (Zen 5), AVX-512', 'NVIDIA H100'."""
    if machine['accelerator']:
        return str(machine['accelerator'])
    name = ' '.join(re.sub(r'\((R|TM)\)|Processor|CPU|@.*', '', machine['processor']).split())
    zen = ZEN.get(machine['family']) if 'AMD' in name else None
    return ', '.join(filter(None, (f'{name} ({zen})' if zen else name, machine['vectors'])))


def record(machine: Mapping[str, Any], results: Iterable[Mapping[str, Any]] = (), **others: Mapping[str, Any]) -> None:
    """Keep what was measured in the file of this processor, in place of older figures of the same, and in docs/.

    `results`: cases of `speed.py`; `others`: what other benchmarks measured, by their names.
    """
    target = FIGURES / f'{re.sub("[^a-z0-9]+", "-", title(machine).lower())}.json'
    kept = json.loads(target.read_text()) if target.exists() else {'cases': []}
    versions = {'versions': machine['versions']}
    cases = {tuple(case[name] for name in CASE): case for case in kept['cases']}
    cases |= {tuple(case[name] for name in CASE): {**case, **versions} for case in results}
    kept['machine'] = {name: value for name, value in machine.items() if name != 'versions'}
    kept |= {'cases': list(cases.values()), **{name: {**versions, **figures} for name, figures in others.items()}}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + '\n')
    write()


def write() -> None:
    """Make all tables anew."""
    for page in TABLES:
        (DOCS / page).write_text(filled(page, (DOCS / page).read_text()))


def filled(page: str, text: str) -> str:
    """A page with its tables made anew."""
    for name, make in TABLES[page].items():
        before, start, rest = text.partition(f'<!-- table {name} -->\n\n')
        _, end, after = rest.partition('<!-- end of table -->')
        if not end:
            raise ValueError(f'{page} has no place for the table {name!r}.')
        text = f'{before}{start}{make()}\n{end}{after}'
    return text


def markdown(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    heading = list(heading)
    lines = [f'| {" | ".join(line)} |'.replace('|  |', '| |') for line in (heading, *rows)]
    lines.insert(1, '|---' * len(heading) + '|')
    return '\n'.join(lines) + '\n'


def by_machine() -> list[dict[str, Any]]:
    """What each processor measured."""
    return [json.loads(file.read_text()) for file in sorted(FIGURES.glob('*.json'))]


def of_others(name: str, rows_of: Callable[[Mapping[str, Any]], Mapping[str, str]]) -> str:
    """Of another benchmark than that of speed: the cells of each machine by what their rows are called."""
    return of_columns({title(each['machine']): rows_of(each[name]) for each in by_machine() if name in each})


def startup_cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """Medians."""
    return {f'`{command}`': f'{statistics.median(runs):.2f}' for command, runs in figures['commands'].items()}


def profiles() -> str:
    """Milliseconds of Flax and of eager PyTorch by kind of work: a table for every machine, a column for every case."""

    def cells(profile: Mapping[str, list[float]]) -> dict[str, str]:
        return {
            kind: ' / '.join(f'{ms:,.0f}' if ms >= 100 else f'{ms:.3g}' for ms in both)
            for kind, both in profile.items()
        }

    return '\n'.join(
        f'{title(each["machine"])}:\n\n'
        + of_columns({case: cells(profile) for case, profile in each['profiles']['cases'].items()})
        for each in by_machine()
        if 'profiles' in each
    )


def of_columns(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table of its columns' cells, by what the rows are called."""
    rows = sorted(dict.fromkeys(row for cells in columns.values() for row in cells), key=lambda row: 'time' in row)
    return markdown(['', *columns], ([row, *(cells.get(row, '–') for cells in columns.values())] for row in rows))


def conversion_cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """Seconds; how many times as long as reading the bytes, round by round; memory, as a share of the file."""

    def cell(runs: Iterable[tuple[float, float, float]]) -> str:
        seconds, memory, _ = (statistics.median(column) for column in zip(*runs, strict=True))
        times = (run[0] / floor[0] for run, floor in zip(runs, next(iter(figures['runs'].values())), strict=True))
        return f'{seconds:.2f} s; {statistics.median(times):.1f}; {memory / figures["bytes"]:.2f}'

    return {way: cell(runs) for way, runs in figures['runs'].items()}


def by_processor(wanted: Callable[[dict[str, Any]], bool], cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for every case that some machine has run, a column for every machine that has run some."""
    columns = {
        title(each['machine']): {key(case): case for case in each['cases'] if wanted(case)} for each in by_machine()
    }
    columns = {name: cases for name, cases in columns.items() if cases}
    rows = sorted({row for cases in columns.values() for row in cases})
    cells = ([cell(cases[row]) if row in cases else '–' for cases in columns.values()] for row in rows)
    return markdown(['', *columns], ([label(row), *line] for row, line in zip(rows, cells, strict=True)))


def key(case: Mapping[str, Any]) -> tuple[int, int, int]:
    """By which the rows of a table are told apart, and in order."""
    return ORDER['model'].index(case['model']), ORDER['size'].index(case['size']), case['batch']


def label(row: tuple[int, int, int]) -> str:
    """What is run in a row."""
    model, size, batch = row
    return f'{ORDER["model"][model]} {ORDER["size"][size]}, batch {batch}'


def speeds(case: Mapping[str, Any], other: str, ours: str = 'Flax') -> list[float]:
    """How many times as fast as another way ours was, round by round."""
    rounds = (case['ways'][way]['rounds'] for way in (other, ours))
    return [theirs / own for theirs, own in zip(*rounds, strict=True)]


def whole_cell(case: Mapping[str, Any]) -> str:
    """Milliseconds; times eager PyTorch's speed, and the spread over the rounds; times torch.compile's; the ceiling."""
    ours, eager = case['ways']['Flax'], speeds(case, 'PyTorch eager')
    spread = f'{statistics.median(eager):.2f} ({min(eager):.2f} to {max(eager):.2f})'
    compiled = f'{statistics.median(speeds(case, "torch.compile")):.2f}' if 'torch.compile' in case['ways'] else '–'
    return f'{1e3 * ours["seconds"]:,.0f} ms; {spread}; {compiled}; {100 * ours["share_of_ceiling"]:.0f} %'


def huge_pages_cell(case: Mapping[str, Any]) -> str:
    """With huge pages: milliseconds; times the speed of eager PyTorch without them and with them."""
    ours = 'Flax, huge pages'
    others = ('PyTorch eager', 'PyTorch eager, huge pages')
    plain, huge = (statistics.median(speeds(case, other, ours)) for other in others)
    return f'{1e3 * case["ways"][ours]["seconds"]:,.0f} ms; {plain:.2f}; {huge:.2f}'


def short_cell(case: Mapping[str, Any]) -> str:
    """Times the speed of eager PyTorch and of torch.compile."""
    return ', '.join(f'{statistics.median(speeds(case, way)):.2f}' for way in ('PyTorch eager', 'torch.compile'))


def linen_cell(case: Mapping[str, Any]) -> str:
    """Milliseconds of the plain model, and how many times as fast the port is."""
    milliseconds = 1e3 * case['ways']['plain linen']['seconds']
    return f'{milliseconds:,.0f} ms; {statistics.median(speeds(case, "plain linen")):.2f}'


def of(dtype: str, *, training: bool, way: str = 'Flax') -> Callable[[dict[str, Any]], bool]:
    """Whether a case is of this kind, and was run in a way."""
    return lambda case: (case['dtype'], case['training']) == (dtype, training) and way in case['ways']


def scaling(name: str) -> dict[str, Any]:
    """What `scaling.py` measured on the CPU ('scaling') or for an accelerator ('h100', 'v5e')."""
    figures: dict[str, Any] = json.loads((DOCS / 'figures' / f'{name}.json').read_text())
    return figures


def mebibytes(row: Mapping[str, Any], work: str) -> str:
    """The temporary memory that is planned for 'forward' or 'gradient'."""
    planned = row[f'{work}_bytes']
    return 'does not fit' if planned is None else f'{planned / 2**20:,.0f}'


def seconds(value: float) -> str:
    """With two digits that count."""
    return f'{value:.0f}' if value >= 10 else f'{value:.1f}' if value >= 1 else f'{value:.2f}'


def memory() -> str:
    """On the CPU: temporary memory and time of whole maps and of chunks."""

    def cell(row: Mapping[str, Any], work: str) -> str:
        time = row[f'{work}_seconds']
        return f'{mebibytes(row, work)} MiB' + (f', {seconds(time)} s' if time else '')

    rows = [
        [model, f'{tokens:,}', *(cell(each, work) for work in ('forward', 'gradient') for each in pair)]
        for (model, tokens), pair in whole_and_chunked(scaling('scaling'))
    ]
    heading = ('model', 'tokens', 'forward, whole map', 'chunked', 'gradient, whole map', 'chunked')
    return markdown(heading, rows)


def memory_of_accelerators() -> str:
    """Of the compilers' plans, in MiB."""
    rows = [
        [model, f'{tokens:,}', work, *(mebibytes(each, work) for each in (*pair, *other))]
        for ((model, tokens), pair), (_, other) in zip(
            whole_and_chunked(scaling('h100')), whole_and_chunked(scaling('v5e')), strict=True
        )
        for work in ('forward', 'gradient')
    ]
    heading = ('model', 'tokens', 'pass', 'H100, whole map', 'chunked', 'TPU v5e, whole map', 'chunked')
    return markdown(heading, rows)


def memory_of_fused_attention() -> str:
    """Of the compilers' plans in bfloat16, in MiB."""
    plans = {
        name: {(row['model'], row['tokens'], row['attention']): row for row in scaling(name)['fused']}
        for name in ('h100', 'v5e')
    }
    rows = [
        [
            model,
            f'{tokens:,}',
            work,
            *(mebibytes(plans['h100'][model, tokens, how], work) for how in ('plain', 'fused')),
            mebibytes(on_tpu, work) if (on_tpu := plans['v5e'].get((model, tokens, 'fused'))) else '–',
        ]
        for model, tokens, how in plans['h100']
        for work in ('forward', 'gradient')
        if how == 'fused' and tokens > 1000
    ]
    return markdown(('model', 'tokens', 'pass', 'H100, plain', 'H100, fused', 'TPU v5e, either'), rows)


def whole_and_chunked(
    figures: Mapping[str, Any],
) -> list[tuple[tuple[str, int], tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """By model and number of tokens, from a thousand on: the rows of the whole map and of chunks of queries."""
    rows = {(row['model'], row['tokens'], row['chunk'] is not None): row for row in figures['tokens']}
    keys = sorted({key[:2] for key in rows if key[1] > 1000})
    return [(key, (rows[*key, False], rows[*key, True])) for key in keys]


def compilation(names: Iterable[str], works: Iterable[str], heading: Iterable[str]) -> str:
    """Seconds to compile by model and options: for each file and work, at depth 8 and 64."""
    cells: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for work in works:
            for row in scaling(name)['depth']:
                options = ', '.join(f'`{option}`' for option in ('scan_layers', 'remat') if row.get(option)) or 'none'
                cells.setdefault((row['model'], options), []).append(seconds(row[f'{work}_seconds']))
    return markdown(('model', 'options', *heading), ([*key, *line] for key, line in cells.items()))


SPEED: dict[str, Callable[[], str]] = {
    'in short': lambda: by_processor(
        lambda case: of('float32', training=False)(case) and (case['size'], case['batch']) == ('S/16', 8), short_cell
    ),
    'forward': lambda: by_processor(of('float32', training=False), whole_cell),
    'training': lambda: by_processor(of('float32', training=True), whole_cell),
    'forward in bfloat16': lambda: by_processor(of('bfloat16', training=False), whole_cell),
    'training in bfloat16': lambda: by_processor(of('bfloat16', training=True), whole_cell),
    'training with huge pages': lambda: by_processor(
        of('float32', training=True, way='Flax, huge pages'), huge_pages_cell
    ),
    'training in bfloat16 with huge pages': lambda: by_processor(
        of('bfloat16', training=True, way='Flax, huge pages'), huge_pages_cell
    ),
    'plain linen': lambda: by_processor(of('float32', training=False, way='plain linen'), linen_cell),
    'memory': memory,
    'memory of accelerators': memory_of_accelerators,
    'memory of fused attention': memory_of_fused_attention,
    'compilation': lambda: compilation(
        ['scaling'],
        ['forward', 'step'],
        ('forward, depth 8', 'depth 64', 'training step, depth 8', 'depth 64'),
    ),
    'compilation for accelerators': lambda: compilation(
        ['h100', 'v5e'], ['step'], ('H100, depth 8', 'depth 64', 'TPU v5e, depth 8', 'depth 64')
    ),
}

# By the page they are on.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    'performance.md': SPEED | {'profiles': profiles, 'start-up': lambda: of_others('startup', startup_cells)},
    'checkpoints.md': {'conversion': lambda: of_others('conversion', conversion_cells)},
}

if __name__ == '__main__':
    write()
