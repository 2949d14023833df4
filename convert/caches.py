"""Where what can be fetched or made again is kept between runs. Imported by any room, and by the start of a command."""

import os
from contextlib import suppress
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """The folder of that name among the user's caches, or None where nothing can be kept."""
    with suppress(OSError, RuntimeError):  # nobody's home is known, the disk is full or for reading alone
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path('~/.cache').expanduser()) / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None
