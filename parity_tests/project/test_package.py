"""The wheel, alone in a fresh environment that has no torch."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'build', '--wheel', '--outdir', str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob('*.whl')
    return path


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names if '.dist-info' not in name} == {'flax_vit', 'convert'}
    assert {
        'flax_vit/py.typed',
        'convert/py.typed',
        'convert/digits/simple_vit.pt',
        'convert/digits/vit.pt',
        'convert/proof/report.html.j2',
    } <= set(names)


@pytest.mark.slow
def test_it_converts_without_torch(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    scripts = tmp_path / 'venv' / ('Scripts' if sys.platform == 'win32' else 'bin')
    subprocess.run([scripts / 'python', '-m', 'pip', 'install', '--quiet', wheel], check=True, capture_output=True)
    installed = subprocess.run([scripts / 'python', '-m', 'pip', 'list'], check=True, capture_output=True, text=True)
    assert 'torch' not in installed.stdout

    digits = ROOT / 'examples' / 'digits'
    for source, fields in (
        (digits / 'simple_vit.pt', ['--image-size', '8', '--patch-size', '4', '--heads', '3']),
        (digits / 'simple_vit.safetensors', ['--image-size', '8', '--patch-size', '4', '--heads', '3']),
        (digits / 'deep_vit.pt', ['--channels', '1']),
        (digits / 'vit.pt', ['--channels', '1', '--heads', '2']),
        (digits / 'deep_vit.safetensors', ['--channels', '1']),
    ):
        folder = tmp_path / source.name
        subprocess.run([scripts / 'flax-vit', 'convert', source, folder, *fields], check=True, cwd=tmp_path)
        script = f"""
import flax_vit, jax.numpy as jnp
model, variables = flax_vit.from_pretrained({str(folder)!r})
assert model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape == (2, 10)
"""
        subprocess.run([scripts / 'python', '-c', script], check=True, cwd=tmp_path)
    verify = subprocess.run(
        [scripts / 'flax-vit', 'verify', digits / 'deep_vit.pt', '--channels', '1'],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert verify.returncode == 2
    assert "pip install 'flax-vit[torch]'" in verify.stderr
