"""The benchmark of speed runs, is fair, and writes what its readers expect."""

import itertools
import json
import os
import pathlib
import re
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
        # Not every machine has the C++ compiler and the headers of Python that torch.compile needs.
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1', 'TORCHDYNAMO_DISABLE': '1'},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr
    (case,) = json.loads(figures.read_text())['cases']
    assert case['ceiling_flops_per_second'] > 0
    assert list(case['ways']) == ['PyTorch eager', 'torch.compile', 'fused attention', 'plain linen', 'Flax']
    for way in case['ways'].values():
        assert way['seconds'] > 0
        assert way['speed'] > 0
        assert way['memory_bytes'] > 0


def test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed import all_cases, telling_cases

    on_cpu, on_gpu = (all_cases(gpu=gpu) for gpu in (False, True))
    telling = telling_cases()
    assert set(telling) < set(on_cpu)
    for what in ('model', 'size', 'dtype', 'training'):
        assert {getattr(case, what) for case in telling} == {getattr(case, what) for case in on_cpu}
    for chosen in (on_cpu, on_gpu, telling):
        assert len(set(chosen)) == len(chosen)
    for chosen in (on_cpu, on_gpu):
        forwards = [case for case in chosen if case.dtype == 'float32' and not case.training]
        assert {(case.model, case.size) for case in forwards} == {(case.model, case.size) for case in chosen}
        assert {1, 8} <= {case.batch for case in forwards}
        assert all(case.dtype != 'float16' for case in chosen if case.training)
    assert {case.dtype for case in on_gpu} - {case.dtype for case in on_cpu} == {'float16'}


@pytest.mark.parametrize('gpu', [False, True])
def test_ways(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ways

    monkeypatch.setattr(ways, 'on_gpu', lambda: gpu)
    for model, training in itertools.product(('ViT', 'DeepViT'), (False, True)):
        chosen = ways.ways_of(ways.Case(model, 'S/16', 8, 'float32', training))
        assert ('fused attention' in chosen) == (model == 'ViT')
        assert [name.endswith('huge pages') for name in chosen].count(True) == (2 if training and not gpu else 0)


def test_the_tables_are_those_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    for page, made in tables.TABLES.items():
        text = (tables.DOCS / page).read_text()
        assert tables.filled(page, text) == text, 'python benchmarks/tables.py makes them anew'
        assert len(re.findall(r'^<!-- table ', text, re.MULTILINE)) == len(made)


def test_figures_are_kept_by_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """A case that is measured again takes its old figures' place, in the file and in the tables; the others stay."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    page = tmp_path / 'performance.md'
    of_speed = [name for name in tables.SPEED if not name.startswith(('memory', 'compilation'))]
    others = 'start-up', 'profiles'
    monkeypatch.setattr(tables, 'DOCS', tmp_path)
    monkeypatch.setattr(tables, 'FIGURES', tmp_path / 'processors')
    made = tables.TABLES['performance.md']
    for name, names in {'performance.md': [*of_speed, *others], 'checkpoints.md': ['conversion']}.items():
        (tmp_path / name).write_text(''.join(f'<!-- table {each} -->\n\n<!-- end of table -->\n' for each in names))
    monkeypatch.setitem(tables.TABLES, 'performance.md', {name: made[name] for name in (*of_speed, *others)})
    machine = {
        'processor': 'Some(R) Processor @ 3 GHz', 'family': '25', 'vectors': 'AVX2', 'accelerator': None,
        'versions': {'jax': '1'},
    }  # fmt: skip
    assert tables.title(machine | {'processor': 'AMD EPYC'}) == 'AMD EPYC (Zen 3 or 4), AVX2'

    def case(batch: int, ours: float, *, training: bool = False) -> dict[str, Any]:
        rounds = {'PyTorch eager': [0.2, 0.3, 0.4], 'torch.compile': [0.2] * 3, 'plain linen': [0.1] * 3}
        ways = {name: {'seconds': each[1], 'rounds': each} for name, each in rounds.items()}
        ways['Flax'] = {'seconds': ours, 'rounds': [ours] * 3, 'share_of_ceiling': 0.5}
        if training:
            ways['PyTorch eager, huge pages'] = ways.pop('torch.compile')
            ways['Flax, huge pages'] = ways['plain linen']
        about = {'model': 'ViT', 'size': 'S/16', 'batch': batch, 'dtype': 'float32', 'training': training}
        return {**about, 'ways': ways}

    tables.record(machine, [case(1, 0.4), case(8, 0.4), case(8, 0.4, training=True)])
    tables.record(machine | {'versions': {'jax': '2'}}, [case(8, 0.1)])
    tables.record(machine | {'vectors': 'AMX'}, [case(8, 0.2)])
    assert sorted(file.name for file in (tmp_path / 'processors').iterdir()) == ['some-amx.json', 'some-avx2.json']
    kept = json.loads((tmp_path / 'processors' / 'some-avx2.json').read_text())['cases']
    assert [(each['batch'], each['versions']['jax']) for each in kept] == [(1, '1'), (8, '2'), (8, '1')]
    shown = page.read_text()
    assert '| | Some, AMX | Some, AVX2 |' in shown
    assert '| ViT S/16, batch 1 | – | 400 ms; 0.75 (0.50 to 1.00); 0.50; 50 % |' in shown
    cells = '200 ms; 1.50 (1.00 to 2.00); 1.00; 50 % | 100 ms; 3.00 (2.00 to 4.00); 2.00; 50 %'
    assert f'| ViT S/16, batch 8 | {cells} |' in shown
    assert '| ViT S/16, batch 8 | 1.50, 1.00 | 3.00, 2.00 |' in shown
    assert '| ViT S/16, batch 8 | 100 ms; 0.50 | 100 ms; 1.00 |' in shown
    assert '| ViT S/16, batch 8 | 400 ms; 0.75 (0.50 to 1.00); –; 50 % |' in shown
    assert '| ViT S/16, batch 8 | 100 ms; 3.00; 2.00 |' in shown

    runs = {
        'reading the bytes': [[1, 100, 0], [2, 100, 0], [3, 100, 0]],
        'torch.load': [[4, 150, 0], [2, 150, 0], [3, 150, 0]],
    }
    profiles = {'cases': {'ViT': {'GELU': [1.234, 2]}}}
    startup = {'commands': {'python': [1, 3, 2]}}
    tables.record(machine, conversion={'bytes': 100, 'runs': runs}, startup=startup, profiles=profiles)
    assert '| torch.load | 3.00 s; 1.0; 1.50 |' in (tmp_path / 'checkpoints.md').read_text()
    assert '| `python` | 2.00 |' in page.read_text()
    assert 'Some, AVX2:\n\n| | ViT |\n|---|---|\n| GELU | 1.23 / 2 |' in page.read_text()
    assert json.loads((tmp_path / 'processors' / 'some-avx2.json').read_text())['cases'] == kept


def test_a_way_that_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed import measure
    from ways import Case

    with pytest.raises(click.ClickException, match='PyTorch eager ended before it was measured'):
        measure(Case('SimpleViT', 'Ti/16', 1, 'no such dtype', False), ['PyTorch eager'], rounds=1, side=1)


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
