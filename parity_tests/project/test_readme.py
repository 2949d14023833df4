"""Every example in the README and under docs/, run as a reader would run it."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest

from parity_tests.support.pages import PAGES, ROOT, blocks
from parity_tests.support.slow import slow_but

SCRIPTS = pathlib.Path(sysconfig.get_path('scripts'))
# What one process alone cannot run: test_sharding.py joins two, test_hub.py has a hub.
ELSEWHERE = ('jax.distributed.initialize(', "'owner/")

# Blocks of Python in turn, where no torch can be imported.
WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, *_):
        if name.split('.')[0] == 'torch':
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch())
names = {}
for block in sys.stdin.read().split('\\0'):
    exec(block, names)
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'page', slow_but(PAGES[0], [page for page in PAGES if blocks(page, 'python')]), ids=lambda page: page.stem
)
@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # the examples assume, and are told so
def test_from_top_to_bottom(page: pathlib.Path, folder: pathlib.Path) -> None:
    """All blocks of a page in its order, Python in one interpreter, where the examples are."""
    for _ in range(2 if page.stem == 'folders' else 1):  # what is saved may be saved again
        names: dict[str, object] = {}
        for language, text in blocks(page, 'python', 'console'):
            if language == 'console':
                for command in text.splitlines():
                    flax_vit(command, folder)
            elif not any(words in text for words in ELSEWHERE):
                exec(text, names)


def flax_vit(command: str, folder: pathlib.Path) -> None:
    """Run a command of ours; what others do (pip, make, …) is not tried."""
    program, *arguments = shlex.split(command, comments=True) or ['']
    if program == 'flax-vit' and arguments != ['demo']:
        ended = subprocess.run([SCRIPTS / program, *arguments], cwd=folder, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize('page', ['devices', 'tpu'])
def test_on_eight_devices_without_torch(page: str, folder: pathlib.Path) -> None:
    """Split, trained and kept; docs/tpu.md but for its proof."""
    texts = [
        text
        for _, text in blocks(ROOT / 'docs' / f'{page}.md', 'python')
        if not any(words in text for words in (*ELSEWHERE, 'flax_vit.verify'))
    ]
    ended = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_TORCH],
        input='\0'.join(texts),
        cwd=folder,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    kept = {'devices': 'spread-vit', 'tpu': 'digits-tuned.npz'}
    assert (folder / kept[page]).exists()


def test_the_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    (_, two_commands), (_, by_hand), *_ = blocks(PAGES[0], 'console')
    for target in ('demo', 'test'):
        assert f'make {target} ' in two_commands
        assert f'\n{target}: ' in makefile
    by_hand = by_hand.replace(' && ', '\n')
    for command in ('ruff check .', 'ruff format --check .', 'mypy', 'pytest --numprocesses auto'):
        assert command in makefile
        assert command in by_hand


def test_what_pages_name_is_there() -> None:
    """Files of the project, constants in them, modules that are run, tests."""
    pages = [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
    text = '\n'.join(page.read_text(encoding='utf-8') for page in pages).replace('`flax_vit/your_model.py`', '')
    files = re.findall(r'\b(?:benchmarks|convert|examples|flax_vit|parity_tests)/[\w/]*\w\.\w+', text)
    files += [name.replace('.', '/') + '.py' for name in re.findall(r'python -m (parity_tests[.\w]*\w)', text)]
    assert len(files) > 30
    assert [file for file in files if not (ROOT / file).exists()] == []
    for name, file in re.findall(r'`(_?[A-Z]{4,})`\s+in\s+`(\w+(?:/\w+)+\.py)`', text):
        assert re.search(rf'^{name}\b', (ROOT / file).read_text(), re.MULTILINE), name
    tests = '\n'.join(file.read_text() for file in (ROOT / 'parity_tests').rglob('test_*.py'))
    for beginning in re.findall(r'::(test_\w+)', text):
        assert f'def {beginning}' in tests
