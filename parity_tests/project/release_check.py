"""What a release must pass, all but the upload; the workflow runs it on three systems before it publishes.

python -m parity_tests.project.release_check [v0.2.0]

With a tag, it must be the version's, and the changelog must have a dated section for it. The source distribution and
the wheel are built into dist/, their metadata is rendered, and each is installed in a fresh environment, where the demo
runs.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

from flax_vit import __version__
from parity_tests.support.pages import ROOT

DIST = ROOT / 'dist'


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print('$', *(str(word) for word in command), flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def metadata_of(wheel: Path) -> Message:
    """What the package page shows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return message_from_string(archive.read(name).decode())


def check_tag(tag: str, version: str, changelog: str) -> None:
    """Raises SystemExit where the tag, the version and the changelog don't agree."""
    if tag != f'v{version}':
        sys.exit(f'The tag {tag} is not v{version}: set __version__ in flax_vit/__init__.py first.')
    if not re.search(rf'^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$', changelog, re.MULTILINE):
        sys.exit(f'CHANGELOG.md has no line "## [{version}] - <date>".')


def check_metadata(metadata: Message, repository: str | None) -> None:
    """Raises SystemExit where the package page would lead nowhere, or to another repository than `repository`."""
    local = re.findall(r'\]\((?!https?://|#)[^)]*\)', str(metadata.get_payload()))
    if local:
        sys.exit(f'Links on the package page that lead nowhere: {", ".join(local)}.')
    urls = dict(line.split(', ', 1) for line in metadata.get_all('Project-URL', []))
    if repository and urls['Source'] != f'https://github.com/{repository}':
        sys.exit(f'This is {repository}, but [project.urls] in pyproject.toml says {urls["Source"]}.')


def try_out(package: Path) -> None:
    """Install it with what the demo needs, far from the checkout, and run the demo."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder, 'Scripts' if sys.platform == 'win32' else 'bin')
        run(scripts / 'python', '-m', 'pip', 'install', '--quiet', f'{package}[demo]', cwd=Path(folder))
        run(scripts / 'flax-vit', 'demo', cwd=Path(folder))


def main() -> None:
    for old in DIST.glob('*'):
        old.unlink()
    run(sys.executable, '-m', 'build', '--outdir', DIST, ROOT)
    (wheel,), (source,) = DIST.glob('*.whl'), DIST.glob('*.tar.gz')
    run(sys.executable, '-m', 'twine', 'check', '--strict', wheel, source)
    for tag in sys.argv[1:]:
        check_tag(tag, __version__, (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'))
    check_metadata(metadata_of(wheel), os.environ.get('GITHUB_REPOSITORY'))
    for package in (wheel, source):
        try_out(package)
    print(f'flax-vit {__version__} may be released.')


if __name__ == '__main__':
    main()
