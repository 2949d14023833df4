"""Where the time of a forward or of a training step goes, in Flax and in PyTorch, by kind of work.

    python benchmarks/parts.py [--model SimpleViT] [--size Ti/16] [--batch 1] [--training]
    python benchmarks/parts.py --record

The second profiles what docs/performance.md shows, and keeps it there as this processor's.

Both frameworks' own profilers count the milliseconds that each operation runs. XLA fuses operations; a fusion counts as
what its result is of. It also runs operations at once, so that the sum of their times can exceed the time that passes.
PyTorch's profile knows operations, not modules: the LayerNorm of its re-attention counts as LayerNorm.
"""

import collections
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rich_click as click
import tables
from rich.console import Console
from rich.table import Table
from ways import SIZES, Case, eager, flax_program, machine

CALLS = 10
RECORDED = (
    Case('SimpleViT', 'Ti/16', 1, 'float32', False),
    Case('SimpleViT', 'S/16', 8, 'float32', False),
    Case('DeepViT', 'S/16', 8, 'float32', False),
    Case('ViT', 'S/16', 8, 'float32', True),
    Case('DeepViT', 'Ti/16', 8, 'float32', True),
)
# The first pattern that is found counts; for Flax in the path of modules and operation that XLA keeps.
FLAX = {
    'optimizer': r'^(?!.*ViT)',
    'dense layers': r'/(to_qkv|to_out|to_out_0|net_[134]|to_patch_embedding_\d|\w+_head(_1)?)/.*(dot_general|trans)',
    'LayerNorm': r'/(norm|net_0|to_patch_embedding_\d|mlp_head_0)/',
    're-attention': r'reattn_norm_1',
    'attention: products, softmax, moving heads': r'layers_\d+_0/',
    'GELU': r'layers_\d+_1/(net_\d/)?(checkpoint/|erf|mul|add|div|exp|neg|integer_pow|convert)',
    'the rest': r'',
}
PYTORCH = {
    'optimizer': r'adam|foreach|Optimizer|addcdiv|addcmul|lerp',
    'dense layers': r'addmm|aten::mm',
    'LayerNorm': r'layer_norm',
    'GELU': r'gelu',
    'attention: products, softmax, moving heads': r'bmm|softmax|aten::(mul|copy_|cat)$',
    'the rest': r'',
}


def kind(name: str, kinds: Mapping[str, str]) -> str:
    """The kind of an operation."""
    return next(kind for kind, pattern in kinds.items() if re.search(pattern, name))


def operations(program: str) -> dict[str, str]:
    """The path of every operation of a compiled program; of one that XLA kept none for, that of what it works on."""
    paths: dict[str, str] = {}
    for line in program.splitlines():
        if defined := re.match(r'\s*(?:ROOT )?%([\w.\-]+) = ', line):
            path = re.search(r'op_name="([^"]+)"', line)
            operands = (paths.get(name, '') for name in re.findall(r'%([\w.\-]+)', line[defined.end() :]))
            paths[defined[1]] = path[1] if path else next(filter(None, operands), '')
    return paths


def flax_times(case: Case) -> tuple[float, dict[str, float]]:
    """Milliseconds that pass in one call, and those of its operations by kind."""
    import jax

    function, arguments = flax_program(case)
    program = jax.jit(function).lower(*arguments).compile()
    paths = operations(program.as_text() or '')
    seconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        passed = timed(lambda: jax.block_until_ready(program(*arguments)), jax.profiler.trace(folder))
        (file,) = Path(folder).rglob('*.xplane.pb')
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get('hlo_op')
                    if name in paths:
                        seconds[kind(paths[name], FLAX)] += event.duration_ns / 1e9
    return passed, {name: 1e3 * total / CALLS for name, total in seconds.items()}


def pytorch_times(case: Case) -> tuple[float, dict[str, float]]:
    """The same of eager PyTorch."""
    import torch

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    passed = timed(eager(case), profile)
    seconds: collections.Counter[str] = collections.Counter()
    for event in profile.key_averages():
        seconds[kind(event.key, PYTORCH)] += event.self_cpu_time_total / 1e6
    return passed, {name: 1e3 * total / CALLS for name, total in seconds.items()}


def timed(call: Callable[[], Any], profile: Any) -> float:
    """Milliseconds that pass in one of ten calls under a profiler, after three that are not counted."""
    for _ in range(3):
        call()
    with profile:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return 1e3 * (time.perf_counter() - start) / CALLS


@click.command()
@click.option('--model', type=click.Choice(['SimpleViT', 'DeepViT', 'ViT']), default='SimpleViT', show_default=True)
@click.option('--size', type=click.Choice(list(SIZES)), default='Ti/16', show_default=True)
@click.option('--batch', type=click.IntRange(1), default=1, show_default=True)
@click.option('--training', is_flag=True, help='A training step instead of a forward.')
@click.option(
    '--record', is_flag=True, help="The cases of docs/performance.md instead, kept there as this processor's."
)
def main(model: str, size: str, batch: int, training: bool, record: bool) -> None:
    """Profile one case, in float32 on the CPU."""
    os.environ.update(JAX_PLATFORMS='cpu', CUDA_VISIBLE_DEVICES='-1')  # before either framework is imported
    profiles: dict[str, dict[str, list[float]]] = {}
    for case in RECORDED if record else [Case(model, size, batch, 'float32', training)]:
        (flax_total, flax), (pytorch_total, pytorch) = flax_times(case), pytorch_times(case)
        profile = {name: [flax.get(name, 0), pytorch.get(name, 0)] for name in FLAX if name in flax or name in pytorch}
        profile['wall time, with the profiler'] = [flax_total, pytorch_total]
        profiles[str(case)] = profile
        table = Table('milliseconds', 'Flax', 'PyTorch eager', title=str(case))
        for name, both in profile.items():
            table.add_row(name, *(f'{milliseconds:.2f}' for milliseconds in both))
        Console().print(table)
    if record:
        tables.record(machine(), profiles={'cases': profiles})


if __name__ == '__main__':
    main()
