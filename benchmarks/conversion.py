"""Converting a 1 GiB checkpoint: time and peak memory, beside torch.load and a plain copy of the file.

    python benchmarks/conversion.py [--gib 1] [--repetitions 5] [--json FILE]

Each way runs in a process of its own, in turn, so that all meet the same machine; imports are not counted. The file is
in the page cache. Memory is the peak of the process beyond what it had before the work: anonymous memory (what the way
allocates) and, apart, pages of the mapped file, which the system takes back when it needs them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.table import Table

WAYS = {
    'plain copy of the file': 'import shutil\ndef work():\n    shutil.copyfile(source, target)',
    'torch.load': 'import torch\ndef work():\n    return torch.load(source)',
    'convert.from_torch': (
        'import jax, convert\njax.numpy.zeros(1).block_until_ready()\n'
        'def work():\n    return jax.block_until_ready(convert.from_torch(source, image_size=224)[1])'
    ),
    'from_torch and save_pretrained': (
        'import jax, convert, flax_vit\njax.numpy.zeros(1).block_until_ready()\n'
        'def work():\n    flax_vit.save_pretrained(target, *convert.from_torch(source, image_size=224))'
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


def make_checkpoint(path: Path, gib: float) -> None:
    """A SimpleViT of about `gib` GiB in float32, with nothing beside it."""
    import torch
    from vit_pytorch.simple_vit import SimpleViT

    dim = 1024
    depth = round(gib * 2**30 / (12 * dim**2 * 4))
    model = SimpleViT(image_size=224, patch_size=16, num_classes=1000, dim=dim, depth=depth, heads=16, mlp_dim=4 * dim)
    torch.save(model.state_dict(), path)


@click.command()
@click.option('--gib', default=1.0, show_default=True, help='Size of the checkpoint.')
@click.option('--repetitions', type=click.IntRange(1), default=5, show_default=True)
@click.option('--json', 'report', type=click.Path(path_type=Path), help='Write every measurement here.')
def main(gib: float, repetitions: int, report: Path | None) -> None:
    """Measure every way in turn, several times, and print medians."""
    measured: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'checkpoint.pt'
        make_checkpoint(source, gib)
        size = source.stat().st_size
        for repetition in range(repetitions):
            for number, (way, code) in enumerate(WAYS.items()):
                target = Path(folder) / f'{repetition}-{number}'
                command: list[str | Path] = [sys.executable, '-c', MEASURE.format(way=code), source, target]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[way].append(json.loads(run.stdout))
                subprocess.run(['rm', '-rf', target], check=True)

    copy = statistics.median(seconds for seconds, _, _ in measured['plain copy of the file'])
    table = Table('way', 'seconds', 'times the copy', 'memory / size', 'mapped / size', title=f'{size / 2**30:.2f} GiB')
    for way, runs in measured.items():
        seconds, anonymous, mapped = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = statistics.median(
            run[0] / other[0] for run, other in zip(runs, measured['plain copy of the file'], strict=True)
        )
        table.add_row(way, f'{seconds:.2f}', f'{ratio:.2f}', f'{anonymous / size:.2f}', f'{mapped / size:.2f}')
    Console().print(table)
    if report:
        report.write_text(json.dumps({'bytes': size, 'copy': copy, 'runs': measured}, indent=2))


if __name__ == '__main__':
    main()
