"""What the compilers for a GPU and a TPU, which need no device, make of the models.

They come from the package index. Where that is out of reach the test is skipped; in CI that is a failure.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

TESTS = pathlib.Path(__file__).parent
BENCHMARKS = TESTS.parent / 'benchmarks'
MAPS = 4096**2 * 6 * 4  # bytes of the attention maps of six heads at 4,096 patches, in float32


@pytest.mark.slow
@pytest.mark.parametrize('target', ['NVIDIA H100', 'TPU v5e'])
def test_programs_for_accelerators(target: str) -> None:
    ended = subprocess.run(
        [sys.executable, TESTS / 'on_accelerators.py', target, TESTS.parent / 'build' / 'compilers'],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if 'could not be fetched' in ended.stderr:
        pytest.fail(ended.stderr) if os.environ.get('CI') else pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout)
    for name in ('SimpleViT', 'DeepViT'):
        chunks_of_queries_take_a_quarter_of_the_memory(facts[name]['memory'])
        what_the_devices_exchange(name, facts[name]['exchanged'])


def chunks_of_queries_take_a_quarter_of_the_memory(memory: Any) -> None:
    for whole, chunked in memory.values():
        assert whole > MAPS
        assert chunked < whole / 4


def what_the_devices_exchange(name: str, lines: list[str]) -> None:
    """As sharding.py says: to_qkv's activations are gathered, three products summed, and DeepViT's maps twice."""
    tokens = 196 + (name == 'DeepViT')
    gathered = [line for line in lines if ' all-gather' in line]
    assert len(gathered) == 1
    assert f'bf16[32,{tokens},2304]' in gathered[0]
    summed = [line for line in lines if re.search(r'= bf16\[32,19[67],768\]\S* all-reduce', line)]
    assert len(summed) == 3  # after the patch projection, to_out and the feed-forward
    of_maps = [line for line in lines if re.search(rf'\[32,(\d+,)?{tokens},{tokens}\]', line)]
    if name == 'SimpleViT':
        assert not of_maps
    else:  # their mixture (a TPU's compiler cuts it into other shapes) and the mean of its squares, all heads' in one
        assert sum(bool(re.search(r'= f32\[32,197,197\]\S* all-reduce', line)) for line in of_maps) == 1
        assert all(' all-reduce' in line or ' reduce-scatter' in line for line in of_maps)
    assert not any(' all-to-all' in line for line in lines)


def test_a_compiler_that_cannot_be_fetched(tmp_path: pathlib.Path) -> None:
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / 'scaling.py', '--target', 'TPU v5e', '--compilers', tmp_path / 'compilers'],
        env=os.environ | {'PIP_NO_INDEX': '1'},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 1
    assert 'Traceback' not in ended.stderr
    assert re.search('libtpu.* could not be fetched', ended.stderr)
    assert not list((tmp_path / 'compilers').iterdir())
