"""Every example in the README and under docs/, run as a reader would run it."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """What is in the page's code blocks of a language."""
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')], ids=lambda page: page.stem)
@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # the examples assume, and are told so
def test_python(page: pathlib.Path, folder: pathlib.Path) -> None:
    """All blocks of a page, in turn, where the examples are."""
    names: dict[str, object] = {}
    for text in blocks(page, 'python'):
        exec(text, names)
    assert names.keys() > {'__builtins__'}


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'console')], ids=lambda page: page.stem)
def test_command_line(page: pathlib.Path, folder: pathlib.Path) -> None:
    scripts = pathlib.Path(sysconfig.get_path('scripts'))
    for text in blocks(page, 'console'):
        for command in text.splitlines():
            program, *arguments = shlex.split(command, comments=True) or ['']
            if program == 'flax-vit' and arguments != ['demo']:
                subprocess.run([scripts / program, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    two_commands, by_hand, *_ = blocks(PAGES[0], 'console')
    for target in ('demo', 'test'):
        assert f'make {target} ' in two_commands
        assert f'\n{target}: ' in makefile
    by_hand = by_hand.replace(' && ', '\n')
    for command in ('ruff check .', 'ruff format --check .', 'mypy', 'pytest --numprocesses auto'):
        assert f'$(BIN)/{command}\n' in makefile
        assert command in by_hand
