"""What is left out is seen, and in CI nothing is."""

import os
import pathlib
import subprocess
import sys

import pytest

from parity_tests.support.pages import ROOT

SKIPPED = """
import pytest

def test_skipped():
    pytest.skip('no browser')
"""


@pytest.mark.slow
@pytest.mark.parametrize(('ci', 'status'), [('true', 1), ('', 0)])
def test_a_skip_is_said_and_fails_in_ci(ci: str, status: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'test_it.py').write_text(SKIPPED)
    ended = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'parity_tests.conftest', '-rs', '-p', 'no:cacheprovider', tmp_path],
        env=os.environ | {'CI': ci, 'PYTHONPATH': str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == status, ended.stdout
    assert 'no browser' in ended.stdout
