"""The wheel, alone in a fresh environment that has no torch."""

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from parity_tests.project.release_check import check_metadata, check_tag, metadata_of

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
def test_the_package_page_leads_somewhere(wheel: pathlib.Path) -> None:
    metadata = metadata_of(wheel)
    check_metadata(metadata, repository='flax-vit/flax_vit')
    with pytest.raises(
        SystemExit, match=r'This is someone/fork, but .project\.urls. .* says https://github\.com/flax-vit'
    ):
        check_metadata(metadata, repository='someone/fork')
    page = str(metadata.get_payload())
    repository = 'https://github.com/flax-vit/flax_vit/blob/main'
    for link in re.findall(rf'\]\({repository}/(.*?)(?:#.*?)?\)', page):
        assert (ROOT / link).exists(), link
    assert '](https://raw.githubusercontent.com/flax-vit/flax_vit/main/docs/figures/depth.svg)' in page
    metadata.set_payload('[there](docs/proof.md)')
    with pytest.raises(SystemExit, match=r'lead nowhere: \]\(docs/proof\.md\)\.'):
        check_metadata(metadata, repository=None)


def test_a_tag_is_the_versions_and_dated() -> None:
    check_tag('v1.2.0', '1.2.0', '## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n')
    with pytest.raises(SystemExit, match=r'The tag v1\.3\.0 is not v1\.2\.0'):
        check_tag('v1.3.0', '1.2.0', '## [1.2.0] - 2026-12-01\n')
    with pytest.raises(SystemExit, match=r'CHANGELOG\.md has no line "## \[1\.2\.0\] - <date>"'):
        check_tag('v1.2.0', '1.2.0', '## [Unreleased]\n')


def test_actions_are_pinned() -> None:
    """By commits, which nobody can move."""
    used = [
        line.split('uses: ')[1]
        for workflow in (ROOT / '.github' / 'workflows').glob('*.yml')
        for line in workflow.read_text().splitlines()
        if 'uses: ' in line
    ]
    assert len(used) > 8
    assert [action for action in used if not re.fullmatch(r'[\w/-]+@[0-9a-f]{40} # v[\d.]+', action)] == []


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
        (digits / 'vit.pt', ['--channels', '1', '--heads', '2']),
        (digits / 'deep_vit.safetensors', ['--channels', '1']),
    ):
        folder = tmp_path / 'converted' / source.name
        subprocess.run([scripts / 'flax-vit', 'convert', source, folder, *fields], check=True, cwd=tmp_path)
    script = """
import flax_vit, jax.numpy as jnp, pathlib
for folder in pathlib.Path('converted').iterdir():
    model, variables = flax_vit.from_pretrained(folder)
    assert model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape == (2, 10)
"""
    subprocess.run([scripts / 'python', '-c', script], check=True, cwd=tmp_path)
    # What big_vision trained is compared with numpy.
    of_big_vision = ROOT / 'parity_tests' / 'golden' / 'official' / 'bigvision-gap-old_names.npz'
    sizes = ['--image-size', '12x20']
    proven = subprocess.run([scripts / 'flax-vit', 'verify', of_big_vision, *sizes], check=False, cwd=tmp_path)
    assert proven.returncode == 0
    verify = subprocess.run(
        [scripts / 'flax-vit', 'verify', digits / 'deep_vit.pt', '--channels', '1'],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert verify.returncode == 2
    assert "pip install 'flax-vit[torch]'" in verify.stderr
