"""The benchmark of speed runs, is fair, and writes what its readers expect."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import click
import jax
import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.mark.slow
def test_speed(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / 'speed.json'
    options = ['--quick', '--only', 'SimpleViT', '--rounds', '1', '--json', str(figures)]
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / 'speed.py', *options],
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1'},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr
    (case,) = json.loads(figures.read_text())['cases']
    assert case['ceiling_flops_per_second'] > 0
    assert list(case['ways']) == ['PyTorch eager', 'torch.compile', 'fused attention', 'Flax']
    for way in case['ways'].values():
        assert way['seconds'] > 0
        assert way['speed'] > 0
        assert way['memory_bytes'] > 0


def test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed import cases

    on_cpu, on_gpu = (cases(quick=False, gpu=gpu) for gpu in (False, True))
    for chosen in (on_cpu, on_gpu):
        assert len(set(chosen)) == len(chosen)
        forwards = [case for case in chosen if case.dtype == 'float32' and not case.training]
        assert {(case.model, case.size) for case in forwards} == {(case.model, case.size) for case in chosen}
        assert {1, 8} <= {case.batch for case in forwards}
        assert all(case.dtype != 'float16' for case in chosen if case.training)
    assert {case.dtype for case in on_gpu} - {case.dtype for case in on_cpu} == {'float16'}


def test_a_way_that_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed import measure
    from ways import Case

    with pytest.raises(click.ClickException, match='PyTorch eager ended before it was measured'):
        measure(Case('SimpleViT', 'Ti/16', 1, 'no such dtype', False), rounds=1, side=1)


def test_moments_are_there_before_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from ways import Case, eager

    made: list[torch.optim.AdamW] = []

    class Remembered(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(torch.optim, 'AdamW', Remembered)
    eager(Case('SimpleViT', 'Ti/16', 1, 'float32', True))
    (optimizer,) = made
    for parameter in optimizer.param_groups[0]['params']:
        assert {'exp_avg', 'exp_avg_sq'} <= optimizer.state[parameter].keys()
        assert parameter.grad is None


@pytest.mark.parametrize(('one', 'other'), [('PyTorch', 'JAX'), ('JAX', 'PyTorch')])
def test_a_gpu_that_only_one_of_them_sees(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from ways import on_gpu

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: one == 'PyTorch')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu' if one == 'JAX' else 'cpu')
    with pytest.raises(click.ClickException, match=f'{one} would run on an accelerator, {other} on the CPU'):
        on_gpu()
