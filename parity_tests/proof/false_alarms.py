"""How often `verify` calls a right port wrong: a thousand right ports, most of them as ill-conditioned as they come.

python -m parity_tests.proof.false_alarms [--ports 1008] [--dtypes float32 …] [--json FILE]

Rounding depends on the processor, so run it under several ways to round (XLA has no float16 without AVX):

export ATEN_CPU_CAPABILITY=default XLA_FLAGS=--xla_cpu_max_isa=SSE4_2
python -m parity_tests.proof.false_alarms --dtypes float32 bfloat16
ATEN_CPU_CAPABILITY=avx2 XLA_FLAGS=--xla_cpu_max_isa=AVX2 python -m parity_tests.proof.false_alarms
"""

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from rich.progress import track

import convert
from convert.conversion import place
from convert.proof.flax_side import FlaxSide
from convert.proof.measure import Row
from convert.proof.parity import measured, tensors_as_converted
from convert.proof.torch_side import TorchSide
from parity_tests.support.reference import Configuration, deep_vit, perturbed, pytorch, simple_vit, vit

# Two heads are the worst: a LayerNorm over two numbers gives hardly more than their sign.
HEADS = {2: (5, (1, 8)), 3: (2, (2, 5)), 4: (1, (1, 4)), 8: (7, (3, 8))}  # heads: classes, and numbers of images
BUILD: dict[str, Callable[..., Configuration]] = {
    'DeepViT': partial(deep_vit, (8, 8)),
    'SimpleViT': simple_vit,
    'ViT': partial(vit, (8, 8)),
}
SIZES = {'image_size': 8, 'patch_size': 4, 'dim': 12, 'depth': 2, 'mlp_dim': 8, 'dim_head': 4}
DTYPES = ('float32', 'bfloat16', 'float16')
SCALES = (0.3, 1.0, 2.0)  # of all matrices, over the size that keeps products at 1


class Result(NamedTuple):
    """What the measure says of a right port."""

    configuration: str
    dtype: str
    images: int
    scale: float
    seed: int
    rows: list[Row]

    @property
    def right(self) -> bool:
        return all(row.right for row in self.rows)


def results(ports: int, dtypes: Sequence[str] = DTYPES, *, most_heads: int = 8, batches: int = 2) -> Iterator[Result]:
    """The measure of so many right ports, with gradients; what is compiled once serves all of a kind.

    `batches`: of how many of the numbers of images.
    """
    kinds = [
        (name, heads, number) for heads in HEADS if heads <= most_heads for name in BUILD for number in range(batches)
    ]
    every = [(*kind, dtype) for kind in kinds for dtype in dtypes]
    sides: dict[tuple[str, int], FlaxSide] = {}
    for port in range(ports):
        name, heads, number, dtype = every[port % len(every)]
        classes, counts = HEADS[heads]
        count, seed = counts[number], port // len(every)
        scale = SCALES[seed % len(SCALES)]
        configuration = BUILD[name](heads=heads, num_classes=classes, **SIZES)
        with jax.enable_x64(True):
            module = perturbed(pytorch(configuration, torch.float32), seed)
            for parameter in module.parameters():
                parameter.data *= scale if parameter.ndim > 1 else 1
            inspection = convert.inspect(module)
            variables = place(inspection)
            flax = sides.setdefault((name, heads), FlaxSide(inspection.model, variables))
            flax.variables = variables
            tensors, _ = tensors_as_converted(inspection, inspection.model, variables)
            random = np.random.default_rng(port)
            images = random.standard_normal((count, *configuration.image, 3), np.float32)
            weights = random.standard_normal((count, inspection.model.num_classes))
            _, rows = measured(TorchSide(inspection, tensors), flax, images, weights, dtype)
        yield Result(f'{name}, {heads} heads', dtype, count, scale, seed, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--ports', type=int, default=1008)
    parser.add_argument('--json', type=pathlib.Path)
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=DTYPES)
    arguments = parser.parse_args()
    alarms, runs, exact = [], Counter[int](), 0.0
    for result in track(results(arguments.ports, arguments.dtypes), total=arguments.ports):
        runs[result.rows[0].runs] += 1
        exact = max(exact, max(row.exact / row.limit for row in result.rows))
        if not result.right:
            alarms.append(result._replace(rows=[row for row in result.rows if not row.right][:3]))
    figures: dict[str, Any] = {
        'ports': arguments.ports,
        'false alarms': len(alarms),
        'runs of both sides: ports': dict(sorted(runs.items())),
        'largest float64 difference, of its limit': exact,
    }
    for name, value in figures.items():
        print(f'{name}: {value}')
    for alarm in alarms:
        print(alarm)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    main()
