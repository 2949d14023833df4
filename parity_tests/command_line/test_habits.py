"""What people expect of any command: completion, JSON, silence, progress, plain paths, examples, a look at itself."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from convert.command_line import doctor
from convert.command_line.cli import cli
from convert.command_line.facts import joined
from convert.files.remote import local_path
from flax_vit import from_pretrained, save_pretrained
from parity_tests.command_line.conftest import DIGITS, Run
from parity_tests.command_line.test_startup import command, imported

SCRIPTS = sysconfig.get_path('scripts')
CHANNELS = ['--channels', '1']


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('flax-vit insp', ['plain,inspect']),
        ('flax-vit convert vit.pt out --hea', ['plain,--heads']),
        ('flax-vit verify vit.pt --dtype b', ['plain,bfloat16']),
        ('flax-vit demo --q', ['plain,--quiet']),
        ('flax-vit inspect mod', ['file,mod']),
        ('flax-vit export out ba', ['file,ba']),
    ],
)
def test_completions_as_bash_asks_for_them(line: str, expected: list[str]) -> None:
    asked = {'_FLAX_VIT_COMPLETE': 'bash_complete', 'COMP_WORDS': line, 'COMP_CWORD': str(line.count(' '))}
    program = [sys.executable, '-m', 'flax_vit']
    given = subprocess.run(program, env=os.environ | asked, check=True, capture_output=True, text=True)
    assert given.stdout.split() == expected
    if 'insp' in line:
        assert imported(command(), DIGITS, **asked) == set()


@pytest.mark.skipif(not shutil.which('bash'), reason='bash is not there')
def test_completions_in_bash() -> None:
    script = """
    eval "$(_FLAX_VIT_COMPLETE=bash_source flax-vit)"
    COMP_WORDS=(flax-vit serve-export out served.npz --plat) COMP_CWORD=4
    $(complete -p flax-vit | grep -o '_[a-z_]*') flax-vit
    echo "${COMPREPLY[@]}"
    """
    path = f'{SCRIPTS}{os.pathsep}{os.environ["PATH"]}'
    asked = subprocess.run(
        ['bash', '-c', script], env=os.environ | {'PATH': path}, check=True, capture_output=True, text=True
    )
    assert (asked.stdout, asked.stderr) == ('--platform\n', '')


def keep_wrong_outputs(folder: str) -> None:
    model, variables = from_pretrained(folder)
    zeros = {'images': np.zeros((1, 8, 8, 1)), 'float64': np.zeros((1, 10)), 'float32': np.zeros((1, 10))}
    save_pretrained(folder, model, variables, golden=zeros)


def test_figures_to_standard_output(flax_vit: Run) -> None:
    """With nothing else there, and what was assumed on the other stream."""
    before = set(pathlib.Path().iterdir())
    status, printed, said = flax_vit('verify', 'deep_vit.safetensors', *CHANNELS, '--count', '1', '--json')
    assert (status, json.loads(printed)['right']) == (0, True)
    assert re.fullmatch("Warning: .* assumed, as in vit-pytorch: .*pool='cls'.*\n", said)
    assert set(pathlib.Path().iterdir()) == before
    flax_vit('convert', 'deep_vit.safetensors', 'out', *CHANNELS)
    keep_wrong_outputs('out')
    status, printed, said = flax_vit('verify', 'out', '--json', '-')
    assert (status, json.loads(printed)['right'], said) == (1, False, '')


def test_quiet(flax_vit: Run) -> None:
    """Anywhere on the line; warnings, errors and the exit status stay. The next command speaks again."""
    status, printed, said = flax_vit('-q', 'convert', 'deep_vit.pt', 'out', *CHANNELS)
    assert (status, printed, said.count('Warning: '), said.count('\n')) == (0, '', 2, 2)
    assert 'optimizer_state_dict: 204 tensors' in said
    keep_wrong_outputs('out')
    assert flax_vit('verify', 'out', '--quiet') == (1, '', '')
    assert flax_vit('inspect', '-q', 'out') == (0, '', '')
    status, printed, said = flax_vit('inspect', '--', '-q')
    assert (status, '-q: No such file' in said) == (2, True)
    assert 'DeepViT' in flax_vit('inspect', 'out')[1]


@pytest.mark.skipif(sys.platform == 'win32', reason='it has no such terminals')
@pytest.mark.parametrize(
    ('setting', 'options', 'shown', 'coloured'),
    [
        ('TERM=xterm', [], True, True),
        ('NO_COLOR=1', [], True, False),
        ('TERM=dumb', [], False, False),
        ('TERM=xterm', ['--quiet'], False, True),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else str(value),
)
def test_progress_on_a_terminal(setting: str, options: list[str], shown: bool, coloured: bool) -> None:
    name, _, value = setting.partition('=')
    of_terminals = {'TERM': 'xterm', 'NO_COLOR': '', 'COLUMNS': '80'}
    reader, terminal = os.openpty()
    program = [sys.executable, '-m', 'flax_vit', 'inspect', str(DIGITS / 'vit.safetensors'), '--heads', '2', *options]
    ended = subprocess.run(
        program, env=os.environ | of_terminals | {name: value}, stdout=subprocess.PIPE, stderr=terminal, check=True
    )
    os.write(terminal, b'end\n')
    said = b''
    while not said.endswith(b'end\r\n'):
        said += os.read(reader, 1024)
    os.close(reader)
    os.close(terminal)
    assert (b'Starting JAX' in said, b'Reading' in said) == (shown, shown)
    assert shown or options or said == b'end\r\n'
    assert (re.search(rb'\x1b\[[\d;]*3\dm', said) is not None) == coloured
    assert b'\x1b' not in ended.stdout


def test_a_pipe_gets_neither_progress_nor_colours(tmp_path: pathlib.Path) -> None:
    program = [sys.executable, '-m', 'flax_vit', 'convert', str(DIGITS / 'deep_vit.pt'), 'out', *CHANNELS]
    ended = subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert (ended.stderr, '\x1b' in ended.stdout, '\nConverted to out\n' in ended.stdout) == ('', False, True)


@pytest.mark.parametrize(
    'path',
    [r'C:\models\vit.pt', 'C:/models/vit.pt', 'c://models/vit.pt', 'C:vit', r'owner\name', r'\\server\models\vit.pt'],
)
def test_a_drive_is_no_scheme(path: str) -> None:
    assert local_path(path) == pathlib.Path(path)


@pytest.mark.skipif(sys.platform == 'win32', reason='there it is no name of a file')
def test_backslashes_are_printed_as_they_are(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = r'C:\new models\[bold]\vit.safetensors'
    shutil.copy('vit.safetensors', name)
    _, printed, _ = flax_vit('inspect', name)
    assert f'{name} (safetensors)' in printed
    assert f"'{name}'" in printed
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert joined(['flax-vit', 'inspect', name]) == f'flax-vit inspect "{name}"'


def test_the_examples_of_the_helps(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has some; each is on one line of 80 columns, and does what it says."""
    monkeypatch.setenv('COLUMNS', '80')
    for name in ('', *cli.commands):
        status, printed, _ = flax_vit(*name.split(), '--help')
        lines = [line.strip() for line in printed.partition('Examples')[2].splitlines()[1:] if line.strip()]
        assert (status, any(f'flax-vit {name}' in line for line in lines)) == (0, True), name
        for line in lines:
            program, *arguments = shlex.split(line)
            assert program == 'flax-vit', line
            if arguments != ['demo']:  # test_cli.py runs it
                status, _, said = flax_vit(*arguments)
                assert status == 0, f'{line}: {said}'


def test_doctor(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken or missing is said, with the line that mends it."""

    def installed(package: str) -> str:
        if package == 'aiohttp':  # fsspec[http] needs it
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setattr(doctor, 'version', installed)
    status, printed, said = flax_vit('doctor')
    assert (status, said) == (0, '')
    assert re.search(r'^torch .*, but it cannot be imported: ModuleNotFoundError: ', printed, re.MULTILINE)
    assert re.search(rf'^jax +{re.escape(version("jax"))} *$', printed, re.MULTILINE)
    assert 'optional: test' not in printed  # what only this project's own developers need
    assert re.search(r"^optional: remote +lacks aiohttp: pip install 'flax-vit\[remote\]' *$", printed, re.MULTILINE)
    facts = json.loads(flax_vit('doctor', '--json')[1])
    assert {'torch'} <= set(facts['broken']) <= {'torch', 'vit-pytorch'}
    assert (facts['jax']['backend'], facts['extras']['remote']) == ('cpu', ['aiohttp'])
    assert {'hub', 'torch', 'gpu'} < set(facts['extras'])
