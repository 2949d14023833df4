"""Where what can be fetched or made again is kept between runs. Imported by any room, and by the start of a command."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

COMPILED = 'JAX_COMPILATION_CACHE_DIR'
COMPILED_BYTES = 256 << 20


def cache_folder(name: str) -> Path | None:
    """The folder of that name among the user's caches, or None where nothing can be kept."""
    with suppress(OSError, RuntimeError):  # nobody's home is known, the disk is full or for reading alone
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path('~/.cache').expanduser()) / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def keep_compiled() -> None:
    """Have JAX, once it is imported, keep what it compiles for the next command, unless its own settings say where.

    Where there is no place to keep it, every command compiles anew. What was not used for the longest time goes, so
    that the place does not grow beyond `COMPILED_BYTES` and what one command adds.
    """
    if COMPILED in os.environ:
        return
    folder = cache_folder('flax-vit')
    if folder is None:
        return
    with suppress(OSError):  # another command may be at it, too
        trim(folder, COMPILED_BYTES)
        os.environ[COMPILED] = str(folder)
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')  # a small model's programs, too
        # What could not be kept, or was cut off by a full disk, is compiled anew.
        warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')


def trim(folder: Path, limit: int) -> None:
    """Remove files until those in `folder` have at most `limit` bytes, first what was not used for the longest time.

    Empty ones, which a full disk leaves, would keep their program from ever being kept.
    JAX's own limit needs a package that nothing else here does, and in jax 0.10 fails on files from before it was set.
    """
    files = {path: path.stat() for path in folder.rglob('*') if path.is_file()}
    size = 0
    for path in sorted(files, key=lambda path: -files[path].st_atime_ns):
        size += files[path].st_size
        if size > limit or not files[path].st_size:
            path.unlink(missing_ok=True)  # another command may do the same
