"""Where the command line may run: on a full disk, without a home, into a closed pipe, in another encoding; Ctrl-C."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from convert.caches import COMPILED, keep_compiled, trim
from convert.command_line.export import export
from flax_vit import DeepViT, save_pretrained
from flax_vit.parameters import variable_shapes

# Commands in turn, in a process of its own; `before` is what is done first.
COMMANDS = """
import json, sys
{before}
from convert.command_line.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ['flax-vit', *arguments]
    try:
        main()
    except SystemExit as ended:
        print('ended with', ended.code, file=sys.stderr)
"""
FULL = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))'  # as a quota: EFBIG, not ENOSPC
NOBODY = 'import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid'
WITHOUT_WINDOWS = pytest.mark.skipif(sys.platform == 'win32', reason='it has no such limits, users or signals')


def run(
    commands: Sequence[Sequence[str]], folder: pathlib.Path, before: str = '', **environment: str | None
) -> tuple[list[int], str, str]:
    """The exit status of each, stdout, stderr. None takes a variable out of the environment."""
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    program = [sys.executable, '-c', COMMANDS.format(before=before), json.dumps(commands)]
    ended = subprocess.run(program, cwd=folder, env=changed, capture_output=True, check=False)
    complaint = ended.stderr.decode()
    assert ended.returncode == 0, complaint
    statuses = [int(line.split()[-1]) for line in complaint.splitlines() if line.startswith('ended with')]
    assert len(statuses) == len(commands)
    assert 'Traceback' not in complaint
    return statuses, ended.stdout.decode(), complaint


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a model in `out`, which keeps outputs (not its own), and with the same as a checkpoint."""
    model = DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=8, dim_head=8)
    flat = {path: np.full(shape.shape, 0.5, np.float32) for path, shape in variable_shapes(model).items()}
    golden = {'images': np.ones((4, 8, 8, 3)), 'float64': np.ones((4, 3)), 'float32': np.ones((4, 3))}
    save_pretrained(tmp_path / 'out', model, unflatten_dict(flat), source={'from': 'here'}, golden=golden)
    export(tmp_path / 'out', tmp_path / 'vit.safetensors')
    return tmp_path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@WITHOUT_WINDOWS
def test_a_full_disk_is_one_line_and_nothing_is_lost_or_left(folder: pathlib.Path) -> None:
    before = contents(folder)
    fields = ['--heads', '2']
    commands = {
        'new/model-new.safetensors': ['convert', 'vit.safetensors', 'new', *fields],
        'out/model-new.safetensors': ['convert', 'vit.safetensors', 'out', *fields, '--dropout', '0.5'],
        'back.safetensors': ['export', 'out', 'back.safetensors'],
        'vit.safetensors': ['export', 'out', 'vit.safetensors', '--overwrite'],
        'back.pt': ['export', 'out', 'back.pt'],
        'served.npz': ['serve-export', 'out', 'served.npz'],
        'figures.json': ['verify', 'out', '--json', 'figures.json'],
    }
    statuses, _, complaint = run(list(commands.values()), folder, FULL)
    assert statuses == [2] * len(commands)
    assert [line for line in complaint.splitlines() if line.startswith('Error')] == [
        f'Error: {target}: File too large' for target in commands
    ]
    assert contents(folder) == before


@WITHOUT_WINDOWS
def test_without_a_home_and_a_name(folder: pathlib.Path) -> None:
    nothing = dict.fromkeys(['HOME', 'XDG_CACHE_HOME', COMPILED, 'USER', 'LOGNAME'])
    assert run([['inspect', 'out'], ['export', 'out', 'back.pt']], folder, NOBODY, **nothing)[0] == [0, 0]
    assert not (folder / '~').exists()


def test_an_encoding_with_few_characters(folder: pathlib.Path) -> None:
    (folder / 'vit.safetensors').rename(folder / 'vít.safetensors')
    commands = [['inspect', 'vít.safetensors'], ['inspect', 'vóid.safetensors']]
    statuses, printed, complaint = run(commands, folder, PYTHONIOENCODING='ascii', PYTHONUTF8='0')
    assert statuses == [0, 2]
    assert r'v\xedt.safetensors' in printed
    assert r'v\xf3id.safetensors: No such file' in complaint


@pytest.mark.parametrize('arguments', [['inspect', 'out'], ['--help'], ['verify', 'nowhere']], ids=str)
@WITHOUT_WINDOWS
def test_when_nobody_reads_it_ends_without_a_word(arguments: list[str], folder: pathlib.Path) -> None:
    """As in `flax-vit inspect out | head -1`; also where both streams are closed pipes."""
    end, begin = os.pipe()
    os.close(end)
    errors = begin if 'nowhere' in arguments else subprocess.PIPE
    program = [sys.executable, '-m', 'convert', *arguments]
    ended = subprocess.run(program, cwd=folder, stdout=begin, stderr=errors, check=False, text=True)
    os.close(begin)
    assert (ended.returncode, ended.stderr or '') == (2 if 'nowhere' in arguments else 141, '')


@pytest.mark.skipif(not pathlib.Path('/dev/full').exists(), reason='there is no /dev/full')
def test_a_full_disk_behind_the_output(folder: pathlib.Path) -> None:
    with pathlib.Path('/dev/full').open('w') as full:
        program = [sys.executable, '-m', 'convert', 'inspect', 'out']
        ended = subprocess.run(program, cwd=folder, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert (ended.returncode, 'No space left' in ended.stderr, 'Traceback' in ended.stderr) == (2, True, False)


@WITHOUT_WINDOWS
def test_ctrl_c(folder: pathlib.Path) -> None:
    """Pressed when the weights are about to be renamed: nothing of them is left."""
    before = contents(folder)
    # a shell that starts the tests in the background has its children ignore the key
    press = 'import os, signal, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler); '
    press += 'pathlib.Path.chmod = lambda *_: os.kill(os.getpid(), signal.SIGINT)'
    statuses, _, complaint = run([['convert', 'vit.safetensors', 'new', '--heads', '2']], folder, press)
    assert statuses == [130]
    assert 'Interrupted.' in complaint.splitlines()
    assert contents(folder) == before


def test_the_cache_does_not_grow_without_end(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'within').mkdir()
    for age, name in enumerate(['new', 'within/newer', 'old', 'older', 'oldest', 'empty']):
        (tmp_path / name).write_bytes(b'' if name == 'empty' else b'0123456789')
        os.utime(tmp_path / name, (1000 - age, 0))
    trim(tmp_path, 30)
    assert set(contents(tmp_path)) == {'new', str(pathlib.Path('within', 'newer')), 'old'}


def test_a_cache_for_reading_alone_is_none(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def may(_path: Any, mode: int) -> bool:
        return not mode & os.W_OK

    monkeypatch.setattr(os, 'environ', {'XDG_CACHE_HOME': str(tmp_path)})
    monkeypatch.setattr(os, 'access', may)
    keep_compiled()
    assert COMPILED not in os.environ
