"""Every example in the README, run as a reader would run it."""

import pathlib
import re
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # the example assumes, and is told so
def test_python(folder: pathlib.Path) -> None:
    names: dict[str, object] = {}
    blocks = [text for language, text in BLOCKS if language == 'python']
    assert len(blocks) == 3
    for text in blocks:
        exec(text, names)
    assert (folder / 'my-vit' / 'config.json').exists()
    assert names['logits'].shape == (2, 10)  # type: ignore[attr-defined]


def test_command_line(folder: pathlib.Path) -> None:
    (commands,) = [text for language, text in BLOCKS if language == 'console' and 'flax-vit inspect' in text]
    scripts = pathlib.Path(sysconfig.get_path('scripts'))
    for command in commands.splitlines():
        program, *arguments = command.split()
        assert program == 'flax-vit'
        subprocess.run([scripts / program, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    for target in ('demo', 'test'):
        assert f'make {target} ' in BLOCKS[0][1]
        assert f'\n{target}: ' in makefile
    by_hand = BLOCKS[2][1].replace(' && ', '\n')
    for command in ('ruff check .', 'ruff format --check .', 'mypy', 'pytest --numprocesses auto'):
        assert f'$(BIN)/{command}\n' in makefile
        assert command in by_hand
