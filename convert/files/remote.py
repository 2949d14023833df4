"""A source that is no path -> a path: an address, a repository of the Hugging Face Hub, standard input.

What is fetched is kept for the next time, whole or not at all. Imports folders, and the libraries that fetch when they
are needed.
"""

import base64
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from convert.caches import cache_folder
from convert.errors import ConversionError
from convert.files.folders import checkpoint_names, shards
from flax_vit.folders.hub import NAME, asking, huggingface_hub
from flax_vit.folders.whole_files import appearing_whole

_ADDRESS = re.compile(r'([a-z][a-z0-9+.-]+)://.+')
_ON_THE_HUB = re.compile(r'(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>refs/\w+/[^/]+|[^/]+))?(/(?P<path>.+))?')
_REPOSITORY = re.compile(rf'{NAME}(@[\w.-]+)?')
_SHARD = re.compile(r'.*-\d+-of-\d+\.\w+')
_SECONDS = 60  # without a byte, after which a server is given up
# What servers of one kind or another tell a file's versions by.
_VERSION = ('ETag', 'etag', 'Last-Modified', 'LastModified', 'mtime', 'md5Hash', 'created', 'size')


def local_path(source: str | os.PathLike[str]) -> Path:
    """The file or folder that a source names, fetched where it is not on this machine.

    'hf://owner/name@revision/file' is on the Hugging Face Hub, with or without the revision and the file, and so is
    'owner/name' where no such path is here; 'https://…', 's3://…', 'gs://…' and the like are what fsspec reads; '-' is
    standard input.

    Raises:
        ConversionError: When a repository holds no checkpoint, or several; and naming the library that is missing.
        OSError: When it cannot be fetched; FileNotFoundError when it is not there.
    """
    name = os.fspath(source)
    address = _ADDRESS.fullmatch(name)
    path = Path(name)
    with suppress(RuntimeError):  # nobody has that name
        path = path.expanduser()
    if address and address[1] == 'hf':
        return _from_hub(name, name.removeprefix('hf://'))
    if address and not path.exists():
        return _download(name, address[1])
    if name == '-' and not path.exists():
        return _standard_input()
    if _REPOSITORY.fullmatch(name) and not path.parent.exists() and not checkpoint_names([path.name]):
        return _from_hub(name, name)
    return path


def _from_hub(source: str, name: str) -> Path:
    """A file of a repository, or its only checkpoint, with the shards and the config.json that belong to it."""
    parts = _ON_THE_HUB.fullmatch(name.rstrip('/'))
    if not parts:
        raise ConversionError(f'{source} is no address on the Hugging Face Hub: hf://owner/name@revision/file is one.')
    repository, revision = parts['repository'], parts['revision']
    try:
        hub = huggingface_hub()
    except ImportError as error:
        raise ConversionError(f'{source}: {error}') from error

    def fetched(file: str | PurePosixPath) -> Path:
        return Path(hub.hf_hub_download(repository, str(file), revision=revision))

    with asking(hub, source, revision):
        file = PurePosixPath(parts['path'] or '')
        if not checkpoint_names([file.name]):
            # Listing the files instead would try for half a minute where there is no connection.
            held = hub.HfApi().model_info(repository, revision=revision or 'main').siblings
            file = _only_checkpoint(source, file, [sibling.rfilename for sibling in held])
        path = fetched(file)
        revision = path.parents[len(file.parts) - 1].name  # the commit: what belongs together is of one
        if file.name.endswith('.index.json'):
            for shard in sorted(shards(path)):
                if '/' not in shard:  # reading refuses others
                    fetched(file.parent / shard)
        with suppress(hub.errors.EntryNotFoundError):
            fetched(file.parent / 'config.json')
    return path


def _only_checkpoint(source: str, folder: PurePosixPath, files: list[str]) -> PurePosixPath:
    """The one checkpoint in a folder of a repository that holds these files."""
    held = checkpoint_names(PurePosixPath(file).name for file in files if PurePosixPath(file).parent == folder)
    if any(name.endswith('.index.json') for name in held):
        held = {name for name in held if not _SHARD.fullmatch(name)}
    if len(held) == 1:
        return folder / held.pop()
    address = source if source.startswith('hf://') else f'hf://{source}'
    if held:
        offers = '\n'.join(f'  {address.rstrip("/")}/{name}' for name in sorted(held))
        raise ConversionError(f'{source} holds {len(held)} checkpoints; give the one to convert:\n{offers}')
    raise ConversionError(f'{source} holds no checkpoint: {", ".join(sorted(files)[:20]) or "it is empty"}')


def _download(address: str, scheme: str) -> Path:
    """The file at an address, as it was kept if the server has no other by now."""
    name = Path(unquote(urlsplit(address).path)).name or 'download'
    try:
        import fsspec
        import tqdm  # noqa: F401 - without it a TqdmCallback fails twice
        from fsspec.callbacks import TqdmCallback

        hidden = bool(os.environ.get('TQDM_DISABLE')) or None  # None: but on a terminal
        bar = TqdmCallback({'desc': name, 'unit': 'B', 'unit_scale': True, 'disable': hidden})
        files, path = fsspec.core.url_to_fs(address, **(_patience() if scheme in ('http', 'https') else {}))
    except (ImportError, ValueError) as error:
        raise ConversionError(
            f"{address} is read by fsspec: pip install 'flax-vit[remote]', for s3:// s3fs too, for gs:// gcsfs. Or "
            f'download it, and give its path. ({error})'
        ) from error
    try:
        info = files.info(path)
        version = hashlib.sha256(repr([address, *(str(info.get(key)) for key in _VERSION)]).encode()).hexdigest()
        target = (cache_folder('flax-vit-downloads') or Path(_temporary().name)) / version[:16] / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(target) as partial, bar:
                files.get_file(path, str(partial), callback=bar)
                _check(partial, info)
    except Exception as error:  # of any of the libraries that fsspec reads with
        cause = error.__cause__ or error  # of every refusal fsspec says that there is no file
        if isinstance(error, FileNotFoundError) and (cause is error or getattr(cause, 'status', None) == 404):
            raise FileNotFoundError(errno.ENOENT, 'there is no such file', address) from error
        raise OSError(f'{address} cannot be fetched: {type(cause).__name__}: {cause}') from error
    return target


def _patience() -> dict[str, Any]:
    """Options for HTTP: a download may take hours, as long as bytes come."""
    import aiohttp

    return {'client_kwargs': {'timeout': aiohttp.ClientTimeout(sock_connect=_SECONDS, sock_read=_SECONDS)}}


def _check(file: Path, info: Mapping[str, Any]) -> None:
    """OSError unless the file has the size and the MD5 that the server gives, where it gives them."""
    size, expected = file.stat().st_size, info.get('size')
    if expected is not None and size != expected:
        raise OSError(f'{size:,} bytes of {expected:,} came')
    digest = info.get('Content-MD5') or info.get('md5Hash')
    if digest:
        with file.open('rb') as content:
            found = hashlib.file_digest(content, 'md5').digest()
        if found != base64.b64decode(digest):
            raise OSError('the download is damaged: its MD5 differs from what the server says')


@cache
def _standard_input() -> Path:
    """What comes on standard input, in a file; it comes once."""
    path = Path(_temporary().name) / 'standard-input'
    with path.open('wb') as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


@cache
def _temporary() -> TemporaryDirectory[str]:
    """Removed when Python ends."""
    return TemporaryDirectory(prefix='flax-vit-', ignore_cleanup_errors=True)
