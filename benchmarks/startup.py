"""From a command to its result: what a user waits for, imports and compilation included.

    python benchmarks/startup.py [--repetitions 9] [--record]

Each command is a process of its own; all are run in turn, so that all meet the same machine, and the files are in the
page cache. `verify` runs with an empty cache of compiled programs and with what the run before it kept. --record keeps
the figures in docs/, as this processor's.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rich_click as click
import tables
from rich.console import Console
from rich.table import Table
from ways import machine

DIGITS = Path(__file__).parents[1] / 'examples' / 'digits'
SIMPLE = [str(DIGITS / 'simple_vit.pt'), '--image-size', '8', '--patch-size', '4', '--heads', '3']
DEEP = [str(DIGITS / 'deep_vit.pt'), '--channels', '1']
FLAX_VIT = ['-m', 'convert']
COMMANDS = {
    'python': ['-c', ''],
    'import jax': ['-c', 'import jax'],
    'import flax.linen': ['-c', 'import flax.linen'],
    'import flax_vit': ['-c', 'import flax_vit'],
    'from flax_vit import DeepViT': ['-c', 'from flax_vit import DeepViT'],
    'import convert': ['-c', 'import convert'],
    'from convert import from_torch': ['-c', 'from convert import from_torch'],
    'flax-vit --help': [*FLAX_VIT, '--help'],
    'flax-vit inspect simple_vit.pt': [*FLAX_VIT, 'inspect', SIMPLE[0]],
    'flax-vit convert simple_vit.pt': [*FLAX_VIT, 'convert', *SIMPLE, 'out'],
    'flax-vit convert deep_vit.pt': [*FLAX_VIT, 'convert', *DEEP, 'out'],
    'import torch, vit_pytorch': ['-c', 'import torch, vit_pytorch.simple_vit'],
    'flax-vit verify simple_vit.pt, first': [*FLAX_VIT, 'verify', *SIMPLE],
    'flax-vit verify simple_vit.pt, again': [*FLAX_VIT, 'verify', *SIMPLE],
}


@click.command()
@click.option('--repetitions', type=click.IntRange(1), default=9, show_default=True)
@click.option('--record', is_flag=True, help="Keep the figures as this processor's in docs/, in its tables, too.")
def main(repetitions: int, record: bool) -> None:
    """Measure every command in turn, several times, and print medians."""
    measured: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / 'cache'
        environment = {**os.environ, 'XDG_CACHE_HOME': str(cache)}
        environment.pop('JAX_COMPILATION_CACHE_DIR', None)
        for _ in range(repetitions):
            for name, arguments in COMMANDS.items():
                if name.endswith('first'):
                    shutil.rmtree(cache, ignore_errors=True)
                shutil.rmtree(Path(folder) / 'out', ignore_errors=True)
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True
                )
                measured[name].append(time.perf_counter() - start)

    table = Table('command', 'seconds', 'least', 'most')
    for name, seconds in measured.items():
        figures = statistics.median(seconds), min(seconds), max(seconds)
        table.add_row(name, *(f'{figure:.2f}' for figure in figures))
    Console().print(table)
    if record:
        tables.record(machine(), startup={'commands': measured})


if __name__ == '__main__':
    main()
