"""What the compilers for a GPU and a TPU, which need no device, make of the models.

They come from the package index. Where that is out of reach the test is skipped.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from parity_tests.support.pages import ROOT

SCRIPT = ROOT / 'parity_tests' / 'support' / 'on_accelerators.py'
MAPS = 4096**2 * 6 * 4  # bytes of the attention maps of six heads at 4,096 patches, in float32


@pytest.mark.slow
@pytest.mark.parametrize(('target', 'name'), [('NVIDIA H100', 'SimpleViT'), ('TPU v5e', 'DeepViT')])
def test_programs_for_accelerators(target: str, name: str) -> None:
    """One model on each, which takes minutes; `make plans` has the memory of all."""
    ended = subprocess.run(
        [sys.executable, SCRIPT, target, name, ROOT / 'build' / 'compilers'],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if 'could not be fetched' in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout)
    a_quarter_of_the_memory(facts['memory'], MAPS)
    if target == 'NVIDIA H100':
        a_quarter_of_the_memory(facts['fused'], MAPS // 2)  # in bfloat16
    what_the_devices_exchange(name, facts['exchanged'])


def a_quarter_of_the_memory(memory: Any, maps: int) -> None:
    """Of what whole maps take is what chunks of queries take, and the fused attention."""
    for whole, other in memory.values():
        assert whole > maps
        assert other < whole / 4


def what_the_devices_exchange(name: str, lines: list[str]) -> None:
    """As many bytes as mesh.py says; how a compiler joins or cuts them is its own affair, but nothing is moved."""
    tokens = 196 + (name == 'DeepViT')
    activations = 32 * tokens * 768 * 2  # of a device's images, in bfloat16
    # to_qkv's, three times as wide, are gathered; the patch projection's, to_out's and the feed-forward's are summed
    least = 6 * activations
    expected: float = least
    if name == 'DeepViT':  # the sum that mixes the maps, which a TPU pads by a third, and the mean of its squares
        expected += 32 * 12 * tokens**2 * 2 * 4 / 3 + 32 * tokens**2 * 4
    assert least <= sum(map(largest, lines)) <= 1.02 * expected  # LayerNorm's sums of split features are small
    assert not any(' all-to-all' in line for line in lines)


def largest(line: str) -> int:
    """Bytes of the largest array that a line of a program names."""
    found = re.findall(r'(?:bf|f|u)(16|32)\[([\d,]*)\]', line)
    return max(int(bits) // 8 * math.prod(int(side) for side in shape.split(',') if side) for bits, shape in found)


def test_a_compiler_that_cannot_be_fetched(tmp_path: pathlib.Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            ROOT / 'benchmarks' / 'scaling.py',
            '--target',
            'TPU v5e',
            '--compilers',
            tmp_path / 'compilers',
        ],
        env=os.environ | {'PIP_NO_INDEX': '1'},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ended.returncode == 1
    assert 'Traceback' not in ended.stderr
    assert re.search('libtpu.* could not be fetched', ended.stderr)
    assert not list((tmp_path / 'compilers').iterdir())
