"""The benchmark of speed runs, and writes what its readers expect."""

import json
import os
import pathlib
import subprocess
import sys

import click
import jax
import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


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
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    (case,) = json.loads(figures.read_text())['cases']
    assert case['ceiling_flops_per_second'] > 0
    assert list(case['ways']) == ['PyTorch eager', 'torch.compile', 'fused attention', 'Flax']
    for way in case['ways'].values():
        assert way['seconds'] > 0
        assert way['speed'] > 0
        assert way['memory_bytes'] > 0


@pytest.mark.parametrize(('one', 'other'), [('PyTorch', 'JAX'), ('JAX', 'PyTorch')])
def test_a_gpu_that_only_one_of_them_sees(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from ways import on_gpu

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: one == 'PyTorch')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu' if one == 'JAX' else 'cpu')
    with pytest.raises(click.ClickException, match=f'{one} would run on an accelerator, {other} on the CPU'):
        on_gpu()
