"""Converting a 1 GiB checkpoint: time and peak memory, beside reading its bytes and PyTorch's own loading of it.

    python benchmarks/conversion.py [--gib 1] [--repetitions 5] [--record]

Each way runs in a process of its own, in turn, so that all meet the same machine; imports are not counted. The files
are in the page cache. Memory is the peak of the process beyond what it had before the work: anonymous memory (what the
way allocates) and, apart, pages of the mapped file, which the system takes back when it needs them. --record keeps the
figures in docs/, as this processor's.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import rich_click as click
import tables
from rich.console import Console
from rich.table import Table
from ways import machine

CONVERT = """
import jax
from convert import from_torch
jax.numpy.zeros(1).block_until_ready()
def work():
    return jax.block_until_ready(from_torch(source, image_size=224)[1])
"""
# The format of the file, and the code; the first is the floor.
WAYS = {
    'reading the bytes': ('pt', 'def work():\n    return open(source, "rb").read()'),
    'torch.load': ('pt', 'import torch\ndef work():\n    return torch.load(source)'),
    'from_torch of .pt': ('pt', CONVERT),
    'safetensors.torch.load_file': (
        'safetensors',
        'from safetensors.torch import load_file\ndef work():\n    return load_file(source)',
    ),
    'from_torch of .safetensors': ('safetensors', CONVERT),
    'from_torch and save_pretrained': (
        'pt',
        f'{CONVERT}\nfrom flax_vit import save_pretrained\n'
        'def work():\n    save_pretrained(target, *from_torch(source, image_size=224))',
    ),
}

# Runs in the process that is measured: a thread reads the memory every millisecond while the work is done.
MEASURE = """
import json, re, sys, threading, time, warnings
warnings.simplefilter('ignore')
source, target = sys.argv[1:]
{way}
def memory():
    status = open('/proc/self/status').read()
    return [int(re.search(name + r':\\s+(\\d+)', status)[1]) * 1024 for name in ('RssAnon', 'RssFile')]
before, peak, done = memory(), [0, 0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[:] = map(max, peak, memory())
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
result = work()
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps([seconds, peak[0] - before[0], peak[1] - before[1]]))
"""


def make_checkpoints(folder: Path, gib: float) -> None:
    """A SimpleViT of about `gib` GiB in float32, with nothing beside it, in both formats."""
    import torch
    from safetensors.torch import save_file
    from vit_pytorch.simple_vit import SimpleViT

    dim = 1024
    depth = round(gib * 2**30 / (12 * dim**2 * 4))
    model = SimpleViT(image_size=224, patch_size=16, num_classes=1000, dim=dim, depth=depth, heads=16, mlp_dim=4 * dim)
    torch.save(model.state_dict(), folder / 'checkpoint.pt')
    save_file(model.state_dict(), folder / 'checkpoint.safetensors')


@click.command()
@click.option('--gib', default=1.0, show_default=True, help='Size of the checkpoint.')
@click.option('--repetitions', type=click.IntRange(1), default=5, show_default=True)
@click.option('--record', is_flag=True, help="Keep the figures as this processor's in docs/, in its tables, too.")
def main(gib: float, repetitions: int, record: bool) -> None:
    """Measure every way in turn, several times, and print medians."""
    measured: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder), gib)
        size = Path(folder, 'checkpoint.pt').stat().st_size
        for repetition in range(repetitions):
            for number, (way, (form, code)) in enumerate(WAYS.items()):
                source, target = Path(folder, f'checkpoint.{form}'), Path(folder, f'{repetition}-{number}')
                command: list[str | Path] = [sys.executable, '-c', MEASURE.format(way=code), source, target]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[way].append(json.loads(run.stdout))
                subprocess.run(['rm', '-rf', target], check=True)

    table = Table('way', 'seconds', 'times reading', 'memory / size', 'mapped / size', title=f'{size / 2**30:.2f} GiB')
    floors = measured['reading the bytes']
    for way, runs in measured.items():
        seconds, anonymous, mapped = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = statistics.median(run[0] / floor[0] for run, floor in zip(runs, floors, strict=True))
        table.add_row(way, f'{seconds:.2f}', f'{ratio:.2f}', f'{anonymous / size:.2f}', f'{mapped / size:.2f}')
    Console().print(table)
    if record:
        tables.record(machine(), conversion={'bytes': size, 'runs': measured})


if __name__ == '__main__':
    main()
