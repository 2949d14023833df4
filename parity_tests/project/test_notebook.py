"""examples/quickstart.ipynb is examples/quickstart.py, runs from its first cell, and says what is true."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import nbformat
import pytest

from parity_tests.support.notebook import NOTEBOOK, TIMEOUT, unexecuted
from parity_tests.support.pages import ROOT


def read(path: pathlib.Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def codes(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(notebook: Any) -> str:
    return ''.join(output.text for cell in codes(notebook) for output in cell.outputs if 'text' in output)


def check(notebook: Any) -> None:
    """Every cell ran, in order and without a complaint, and what the words between them say is so."""
    assert [cell.execution_count for cell in codes(notebook)] == [*range(1, len(codes(notebook)) + 1)]
    outputs = [output for cell in codes(notebook) for output in cell.outputs]
    assert {(output.output_type, output.get('name')) for output in outputs} == {
        ('stream', 'stdout'),  # no warnings, which go to stderr
        ('display_data', None),
    }
    assert [list(output.data) for output in outputs if 'data' in output] == [['image/png', 'text/plain']]

    text = printed(notebook)
    for name in ('image_size', 'heads', 'dim_head'):
        assert re.search(rf'^{name} +\?  unknown$', text, re.MULTILINE)
    right, wrong = text.split('and yet:')
    assert '\nRIGHT: the Flax model computes what PyTorch does.\n' in right
    assert 'WRONG' not in right
    assert re.search(r'^block 0 attention .* WRONG$', wrong, re.MULTILINE)
    assert '\nblock 0 attention: matches if heads=4 instead of 3\n' in wrong
    in_flax, four_heads, untuned, tuned, scratch, in_torch = map(float, re.findall(r'([\d.]+)%', text))
    assert in_flax > 98
    assert 90 < four_heads < in_flax  # 'a slightly worse model'
    assert tuned > untuned + 15
    assert tuned > scratch + 5
    assert abs(in_torch - tuned) <= 1


def test_its_cells_are_the_scripts() -> None:
    assert NOTEBOOK.exists(), 'make notebook'
    made, kept = unexecuted(), read(NOTEBOOK)
    assert kept.metadata == made.metadata
    for one, other in zip(made.cells, kept.cells, strict=True):
        assert (one.cell_type, one.id, one.metadata) == (other.cell_type, other.id, other.metadata)
        assert one.source == other.source, 'make notebook'
    assert '%pip install' in codes(kept)[0].source


def test_the_outputs_that_are_kept() -> None:
    """They are there, true, small, and of no machine."""
    check(read(NOTEBOOK))
    text = NOTEBOOK.read_text(encoding='utf-8')
    assert len(text) < 150_000
    assert '"execution"' not in text  # times
    words = re.sub(r'"image/png": "[^"]*"', '', text)
    for path in (str(ROOT), str(pathlib.Path.home()), '/home', '/root', '/tmp', '/usr', '/Users', 'site-packages'):
        assert len(path) < 2 or path not in words


@pytest.mark.slow
def test_it_runs_from_its_first_cell(tmp_path: pathlib.Path) -> None:
    """In a process of its own: what Jupyter warns of is no concern of ours."""
    out = tmp_path / 'executed.ipynb'
    ended = subprocess.run(
        [sys.executable, '-m', 'parity_tests.support.notebook', out],
        cwd=ROOT,
        env=os.environ | {'PIP_NO_INDEX': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'},  # all is there
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * TIMEOUT,
    )
    assert ended.returncode == 0, ended.stderr
    check(read(out))
