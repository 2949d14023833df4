"""Files that appear whole or not at all, one writer at a time, and their hashes."""

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != 'win32':
    import fcntl

PARTIAL = '.incomplete'  # ends the name of a file that is being written


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A path to write to; what is written appears at `target`, at once, when the block ends without an error.

    Others may write to `target` meanwhile: the path is nobody else's, and the last to end is seen.
    Raises FileNotFoundError when the folder of `target` does not exist, and OSError, naming `target`, when the disk is
    full or does not take it for another reason.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent} is no folder: make it first, or write to another one.')
    partial = target.with_name(f'{target.name}.{secrets.token_hex(4)}{PARTIAL}')
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors would keep its files from other users
        with partial.open('rb+') as file:
            os.fsync(file.fileno())  # else the name could reach the disk before the bytes, and a power cut part them
        partial.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """For one thread of one process of this machine at a time, the others wait; a killed one holds up nobody.

    Gives what brings the names in the folder to the disk. (Windows has neither for folders, some network's file systems
    neither: there it is left to the caller that one saves at a time.)
    """
    if sys.platform == 'win32':
        yield lambda: None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield lambda: _synchronise(descriptor)
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile holds the descriptor, too
        os.close(descriptor)


def _synchronise(descriptor: int) -> None:
    with suppress(OSError):
        os.fsync(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
