"""What lies in a model's folder: `config.json`, which names the files of the weights, and how files appear whole."""

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_vit.architectures import classes, field_names, name_of

if sys.platform != 'win32':
    import fcntl

FORMAT = 'flax_vit 2'
ONE_FILE = 'flax_vit 1'  # the format before weights could be in several files; read, no longer written
CONFIG = 'config.json'
CARD = 'README.md'  # the Hugging Face Hub shows it as the model's page
WEIGHTS = 'model-{}.safetensors'
GOLDEN = 'golden/'  # begins the names of arrays that are no parameters
PARTIAL = '.incomplete'  # ends the name of a file that is being written
# What a killed save has left, of this version and of earlier ones; the last is what safetensors itself writes to.
_WRITTEN = '|'.join(map(re.escape, (CONFIG, CARD, WEIGHTS.format('new'), 'model.safetensors')))
LEFTOVER = (
    rf'{re.escape(WEIGHTS.format("new"))}|({_WRITTEN})(\.[0-9a-f]{{8}})?{re.escape(PARTIAL)}|\.tmp[0-9A-Za-z]{{6}}'
)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked `config.json` of a folder; its `weights` are a list of {'file': name, 'sha256': hex digits}.

    Raises FileNotFoundError, and ValueError when it is not one of ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: {folder} is no folder that save_pretrained finished.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if config['format'] == ONE_FILE:
            config['weights'] = [config['weights']]
        own = config['format'] in {ONE_FILE, FORMAT} and bool(config['weights']) and 'source' in config
        own = own and all(is_weights(file['file']) and isinstance(file['sha256'], str) for file in config['weights'])
        reason = '.'
        model_of(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        own, reason = False, f' ({type(error).__name__}: {error}).'
    if not own:
        raise ValueError(f'{path} is not the configuration of a model that this version of flax_vit wrote{reason}')
    return config


def new_config(model: nn.Module, source: Any) -> dict[str, Any]:
    """The configuration of a model, as it will be read; its list of weights is still empty.

    ValueError for a field that would not be read as it is, and for a source that is not JSON.
    """
    saved = {}
    for name in field_names(type(model)):
        value = getattr(model, name)
        saved[name] = json.loads(json.dumps(_to_json(value), default=repr))
        if _from_json(name, saved[name]) != value:
            raise ValueError(f'{name}={value!r} cannot be kept in {CONFIG}; give a number or a name instead.')
    try:
        source = json.loads(json.dumps(source, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'source must be JSON (dicts, lists, strings and numbers in UTF-8): {error}.') from error
    return {'format': FORMAT, 'model': name_of(type(model)), 'fields': saved, 'weights': [], 'source': source}


def model_of(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a configuration, with other values for some fields. ValueError for what is no field of it."""
    model_class = classes()[config['model']]
    names = field_names(model_class)
    for name in overrides or {}:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f'do you mean {near[0]}?' if near else f'its fields are {", ".join(names)}.'
            raise ValueError(f'{model_class.__name__} has no field {name}; {hint}')
    chosen = config['fields'] | (overrides or {})
    return model_class(**{name: _from_json(name, value) for name, value in chosen.items()})


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


def check_own(folder: Path) -> None:
    """ValueError unless a model may be saved to `folder`: it holds nothing, or nothing but such a model.

    What is hidden (`.git`, `.gitattributes`) does not count: nothing of it is touched.
    """
    names = {path.name for path in folder.iterdir()}
    own = {CONFIG, CARD} if CONFIG in names else set()
    others = sorted(
        name
        for name in names
        if (folder / name).is_dir() or not (name in own or is_weights(name) or is_leftover(name))
        if not name.startswith('.')
    )
    if others:
        raise ValueError(f'{folder} holds other files ({", ".join(others[:3])}); give a new or empty folder.')
    if own:
        read_config(folder)


def check_hashes(folder: Path, config: Mapping[str, Any]) -> None:
    """ValueError unless the weights are the bytes that were saved."""
    for file in config['weights']:
        path = folder / file['file']
        if sha256(path) != file['sha256']:
            raise ValueError(f'{path} is damaged: its sha256 is not the one in config.json.')


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def is_weights(name: str) -> bool:
    """Whether `save_pretrained` gives such names to the files of the weights."""
    return re.fullmatch(r'model-[0-9a-f]{12}\.safetensors', name) is not None


def is_leftover(name: str) -> bool:
    """Whether a killed `save_pretrained` leaves files of such names."""
    return re.fullmatch(LEFTOVER, name) is not None


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, jax.lax.Precision | np.dtype):
        return value.name
    return value.item() if isinstance(value, np.generic) else value


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(name, item) for item in value)
    precisions = jax.lax.Precision.__members__  # in capitals; jax takes their names, too, in small letters
    return precisions[value] if name == 'precision' and value in precisions else value
