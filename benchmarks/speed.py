"""How fast the port is beside PyTorch, and how near to the machine's matrix products.

    python benchmarks/speed.py [--quick | --all] [--only PATTERN] [--record] [--json FILE] [--picture FILE]

--record keeps the figures in docs/figures/processors, in the file of this machine's processor, and makes the tables of
docs/performance.md anew (`tables.py`).

Every way runs in a process of its own. They run in turn, a quarter of a second each, round after round, so that all
meet the same machine; a ratio is the median over the rounds. The ceiling is the best rate at which either framework
multiplied large matrices in the same rounds; a way's share of it counts its matrix products only. Memory is what a
process gained in its first two calls, parameters and AdamW's moments being there before; compilation is the time of the
first call beyond that of the second.
"""

import itertools
import json
import multiprocessing
import os
import re
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import rich_click as click
import tables
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ways import ENVIRONMENTS, PRODUCTS, SIDE, SIZES, Case, as_json, machine, on_gpu, ways_of, work

MODELS = ('SimpleViT', 'DeepViT')
VIT_SIZES = ('S/16', 'B/16')  # ViT's, which computes what SimpleViT does, with a token and dropouts more


def telling_cases() -> list[Case]:
    """Those that tell most: every model, size, dtype and work in some case, the usual size S/16 in most."""
    usual = [Case(model, 'S/16', 8, 'float32', False) for model in (*MODELS, 'ViT')]
    return [
        *usual,
        Case('SimpleViT', 'README', 8, 'float32', False),
        Case('ViT', 'B/16', 1, 'float32', False),
        Case('ViT', 'S/16', 8, 'bfloat16', False),
        Case('ViT', 'S/16', 8, 'float32', True),
        Case('DeepViT', 'Ti/16', 8, 'float32', True),
        Case('SimpleViT', 'Ti/16', 8, 'bfloat16', True),
    ]


def all_cases(*, gpu: bool) -> list[Case]:
    """Forward in float32 everywhere; training and half precision at one batch size, the largest that takes no hours.

    A GPU does not see its limits in batches of 8, so it gets larger ones, too. It also gets float16, but not to train
    in: AdamW's epsilon is zero there, and after a step nothing but NaN would be multiplied.
    """
    batches = (1, 8, 32) if gpu else (1, 8)
    largest = {size: 1 if size == 'B/16' and not gpu else batches[-1] for size in SIZES}
    chosen = [Case(*which, 'float32', False) for which in itertools.product(MODELS, SIZES, batches)]
    works = [('float32', True), ('bfloat16', False), ('bfloat16', True), *([('float16', False)] if gpu else [])]
    for (dtype, training), model, (size, batch) in itertools.product(works, MODELS, largest.items()):
        chosen.append(Case(model, size, batch, dtype, training))
    chosen += [replace(case, model='ViT') for case in chosen if case.model == MODELS[0] and case.size in VIT_SIZES]
    return list(dict.fromkeys(chosen + telling_cases()))


def measure(case: Case, names: list[str], rounds: int, side: int) -> dict[str, Any]:
    """Ways of a case in turn; seconds, ratios to eager PyTorch's, share of the ceiling, compilation, memory."""
    fork, spawn = multiprocessing.get_context('forkserver'), multiprocessing.get_context('spawn')
    # Its processes have all imported before they start; those that `spawn` starts meet another environment.
    fork.set_forkserver_preload(['ways', 'torch', 'vit_pytorch', 'optax', 'flax.linen', 'flax_vit.architectures'])
    pipes, prepared, processes = {}, {}, []
    seconds: dict[str, list[float]] = {name: [] for name in (*names, *PRODUCTS)}
    try:
        for name in seconds:
            context = spawn if name in ENVIRONMENTS else fork
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, name, case), daemon=True))
            with mock.patch.dict(os.environ, ENVIRONMENTS.get(name, {})):
                processes[-1].start()
            theirs.close()  # so that a process which ends is noticed
            pipes[name] = ours
            prepared[name] = ours.recv()  # before the next starts: it compiles undisturbed
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds[name].append(pipe.recv())
    except (EOFError, ConnectionError) as error:
        raise click.ClickException(f'{case}: {name} ended before it was measured; its error is above.') from error
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()

    rate = 2 * side**3 / min(statistics.median(seconds[name]) for name in PRODUCTS)
    results = {}
    for name in names:
        median = statistics.median(seconds[name])
        ratios = [eager / own for eager, own in zip(seconds['PyTorch eager'], seconds[name], strict=True)]
        results[name] = {
            'seconds': median,
            'speed': statistics.median(ratios),
            'share_of_ceiling': case.flops / median / rate,
            **prepared[name],
            'rounds': seconds[name],
        }
    about = {'date': datetime.now(UTC).date().isoformat(), 'ceiling_flops_per_second': rate}
    return {**as_json(case), **about, 'ways': results}


def table(results: list[dict[str, Any]]) -> Table:
    """For people: a row for every way of every case."""
    shown = Table('case', 'way', 'ms', 'speed', 'of ceiling', 'compile s', 'memory MB')
    for result in results:
        case = str(Case(**{name: result[name] for name in ('model', 'size', 'batch', 'dtype', 'training')}))
        for name, way in result['ways'].items():
            bold = '[bold]' if name == 'Flax' else ''
            figures = (1e3 * way['seconds'], way['speed'], 100 * way['share_of_ceiling'], way['compile_seconds'])
            cells = [form.format(figure) for form, figure in zip(FORMS, figures, strict=True)]
            shown.add_row(
                case, f'{bold}{name}', *(f'{bold}{cell}' for cell in cells), f'{way["memory_bytes"] / 1e6:.0f}'
            )
            case = ''
        shown.add_section()
    return shown


FORMS = ('{:.1f}', '{:.2f} x', '{:.0f} %', '{:.1f}')


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """A bar for every way: how many times as fast as eager PyTorch it is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * len(results)), layout='constrained')
    axes = figure.subplots()
    colours = dict(zip(('torch.compile', 'fused attention', 'Flax'), ('#b0b7c3', '#7d8aa0', '#2563eb'), strict=True))
    for row, result in enumerate(results):
        shown = [name for name in colours if name in result['ways']]
        for place, name in enumerate(shown):
            axes.barh(row + 0.27 * (place - 1), result['ways'][name]['speed'], 0.25, color=colours[name])
    labels = [
        f'{result["model"]} {result["size"]}, batch {result["batch"]}, {result["dtype"]}'
        f'{", training" if result["training"] else ""}'
        for result in results
    ]
    axes.set_yticks(range(len(results)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=1)
    axes.set_xlabel('speed, PyTorch eager = 1')
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.margins(y=0.01)
    axes.legend(loc='upper right')
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(target, dpi=110)


@click.command()
@click.option('--quick', 'which', flag_value='quick', help='The smallest case of each model, to see that it runs.')
@click.option('--all', 'which', flag_value='all', help='All cases: an hour. By default those that tell most.')
@click.option('--rounds', type=click.IntRange(1), default=3, show_default=True, help='Of all ways in turn, per case.')
@click.option('--only', default='', help="Only cases in whose name this is found: 'S/16', 'training', '^ViT'.")
@click.option('--record', is_flag=True, help="Keep the figures as this processor's in docs/, in its tables, too.")
@click.option('--json', 'data', type=click.Path(path_type=Path), help='Write every measurement here.')
@click.option('--picture', type=click.Path(path_type=Path), help='Write a picture of it here (.png, .svg).')
def main(which: str | None, rounds: int, only: str, record: bool, data: Path | None, picture: Path | None) -> None:
    """Measure the port beside PyTorch: forward and training step, all models, four sizes."""
    gpu, about = on_gpu(), machine()
    console = Console()
    console.print(about)  # first: whether it is the GPU that is measured
    sets = {
        'quick': [Case(model, 'Ti/16', 1, 'float32', False) for model in MODELS],
        'all': all_cases(gpu=gpu),
        None: telling_cases(),
    }
    chosen = [case for case in sets[which] if re.search(only, str(case))]
    results = []
    for case in track(chosen, 'Measuring …', console=Console(stderr=True)):
        names = ways_of(case)
        if which is None and case.size != 'S/16':
            names.remove('torch.compile')  # which compiles for half a minute
        results.append(measure(case, names, rounds, SIDE['gpu' if gpu else 'cpu']))
        if data:  # after every case: nothing measured is lost
            data.write_text(json.dumps({'machine': about, 'cases': results}, indent=1))
        if record:
            tables.record(about, results)
    console.print(table(results))
    if picture:
        draw(results, picture)


if __name__ == '__main__':
    main()
