"""The command line, run in the tests' own process."""

import pathlib
import shutil
import sys
from collections.abc import Callable

import pytest

from convert.command_line.cli import main

DIGITS = pathlib.Path(__file__).parents[2] / 'examples' / 'digits'

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flax_vit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an empty folder that holds the digits checkpoints: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for hidden in ('TQDM_DISABLE', 'HF_HUB_DISABLE_PROGRESS_BARS'):  # what --quiet sets ends with the test
        monkeypatch.setenv(hidden, '')
    for path in DIGITS.glob('*.[ps][ta]*'):
        shutil.copy(path, tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['flax-vit', *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run
