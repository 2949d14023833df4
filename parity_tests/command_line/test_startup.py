"""What is not used is not imported, and what was compiled is not compiled again."""

import gc
import os
import pathlib
import subprocess
import sys
from contextlib import suppress
from typing import Any

import jax
import numpy as np
import pytest

import convert
import flax_vit
from convert.caches import keep_compiled
from convert.command_line.cli import for_good

DIGITS = pathlib.Path(__file__).parents[2] / 'examples' / 'digits'
LARGE = {'flax', 'jax', 'matplotlib', 'scipy', 'sklearn', 'torch', 'vit_pytorch'}
NAME = 'JAX_COMPILATION_CACHE_DIR'
CONVERT = ['convert', str(DIGITS / 'deep_vit.pt'), 'out', '--channels', '1']


def imported(program: str, folder: pathlib.Path, **environment: str) -> set[str]:
    """The large packages that a program, in a process of its own, has imported when it ends."""
    report = f'print("imported:", *{LARGE} & set(sys.modules))'
    command = [sys.executable, '-c', f'import sys\ntry:\n    {program}\nfinally:\n    {report}']
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def command(*arguments: str) -> str:
    return f'sys.argv = {["flax-vit", *arguments]}; from convert.command_line.cli import main; main()'


@pytest.mark.parametrize(
    'arguments', [['--help'], ['--version'], ['convert', '--help'], ['verify', '--help'], ['serve-export', '--help']]
)
def test_what_says_something_imports_nothing_large(arguments: list[str], tmp_path: pathlib.Path) -> None:
    assert imported(command(*arguments), tmp_path) == set()


def test_packages_import_what_is_asked_for(tmp_path: pathlib.Path) -> None:
    assert imported('import convert, flax_vit; flax_vit.__version__; dir(convert)', tmp_path) == set()
    assert imported('from flax_vit import DeepViT', tmp_path) == {'flax', 'jax'}
    assert imported('from convert import from_torch, verify', tmp_path) == {'flax', 'jax'}
    assert imported('from flax_vit import from_torch, inspect, to_torch, verify', tmp_path) == {'flax', 'jax'}
    assert imported(command(*CONVERT), tmp_path) == {'flax', 'jax'}


def test_inspecting_takes_no_device(tmp_path: pathlib.Path) -> None:
    """Nothing is compiled, and an accelerator that somebody else uses is left alone."""
    inspect = command('inspect', str(DIGITS / 'simple_vit.pt'))
    assert imported(inspect, tmp_path, JAX_PLATFORMS='none_of_that_name') == {'flax', 'jax'}


def test_garbage_is_looked_for_again_after_imports() -> None:
    """Also after one that failed, but not among what was there."""
    gc.unfreeze()
    with suppress(ImportError), for_good():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


@pytest.mark.parametrize('package', [convert, flax_vit])
def test_every_name_is_there(package: Any) -> None:
    assert all(name in dir(package) and hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match='has no attribute'):
        package.misspelt  # noqa: B018


def test_one_door() -> None:
    assert flax_vit.from_torch is convert.from_torch
    assert flax_vit.verify is convert.verify


def test_a_strangers_module_of_the_converters_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'convert.py').touch()
    command = [sys.executable, '-c', 'import flax_vit; flax_vit.from_torch']
    ended = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert f"ImportError: {tmp_path / 'convert.py'} is found before flax_vit's own package" in ended.stderr


@pytest.mark.parametrize('package', ['flax_vit', 'convert'])
def test_run_as_a_module(package: str) -> None:
    command = [sys.executable, '-m', package, '--version']
    assert flax_vit.__version__ in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_compiled_programs_are_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache folder, by a command that compiles some."""
    monkeypatch.delenv(NAME, raising=False)  # another test's command may have set it
    model = flax_vit.DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=8)
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 3), np.float32)
    logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), images)
    flax_vit.save_pretrained(tmp_path / 'out', model, variables)
    np.savez(tmp_path / 'outputs.npz', images=images, logits=logits)
    verify = command('verify', 'out', '--reference', 'outputs.npz')
    every = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}  # however fast this machine compiles
    imported(verify, tmp_path, JAX_ENABLE_COMPILATION_CACHE='true', XDG_CACHE_HOME='cache', **every)
    assert list(tmp_path.glob('cache/flax-vit/jit_*'))


def test_they_are_kept_only_where_that_is_possible(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere if JAX's own setting says so, and nowhere if the folder can't be made."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path('file').touch()
    for own, cache, expected in (
        (None, 'cache', 'cache/flax-vit'),
        ('own', 'cache', 'own'),
        (None, 'file', None),
    ):
        monkeypatch.setattr(os, 'environ', {'XDG_CACHE_HOME': cache, **({NAME: own} if own else {})})
        keep_compiled()
        assert os.environ.get(NAME) == expected
