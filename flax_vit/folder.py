"""What lies in a model's folder: `config.json`, which names the files of the weights, and how files appear whole."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vit.deep_vit import DeepViT
from flax_vit.simple_vit import SimpleViT

FORMAT = 'flax_vit 2'
ONE_FILE = 'flax_vit 1'  # the format before weights could be in several files; read, no longer written
MODELS: Mapping[str, type[nn.Module]] = {'DeepViT': DeepViT, 'SimpleViT': SimpleViT}
CONFIG = 'config.json'
CARD = 'README.md'  # the Hugging Face Hub shows it as the model's page
WEIGHTS = 'model-{}.safetensors'
PARTIAL = '.incomplete'  # ends the name of a file that is being written


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
        own = config['format'] in {ONE_FILE, FORMAT} and isinstance(config['fields'], dict)
        own = own and set(config['fields']) <= set(field_names(MODELS[config['model']])) and bool(config['weights'])
        own = own and all(is_weights(file['file']) and isinstance(file['sha256'], str) for file in config['weights'])
    except (ValueError, KeyError, TypeError, AttributeError):
        own = False
    if not own:
        raise ValueError(f'{path} is not the configuration of a model that this version of flax_vit wrote.')
    return config


def new_config(model: nn.Module, hashes: Mapping[str, str], source: Any) -> dict[str, Any]:
    """The configuration of a model whose weights are in the files of these names, with their sha256."""
    return {
        'format': FORMAT,
        'model': type(model).__name__,
        'fields': {name: _to_json(getattr(model, name)) for name in field_names(type(model))},
        'weights': [{'file': name, 'sha256': digest} for name, digest in hashes.items()],
        'source': source,
    }


def model_of(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a configuration, with other values for some fields. ValueError for what is no field of it."""
    model_class = MODELS[config['model']]
    strangers = sorted(set(overrides or {}) - set(field_names(model_class)))
    if strangers:
        raise ValueError(f'{model_class.__name__} has no field {", ".join(strangers)}.')
    chosen = config['fields'] | (overrides or {})
    return model_class(**{name: _from_json(name, value) for name, value in chosen.items()})


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A path to write to; what is written appears at `target`, at once, when the block ends without an error."""
    partial = target.with_name(target.name + PARTIAL)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors would keep its files from other users
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_own(folder: Path) -> None:
    """ValueError unless a model may be saved to `folder`: there is nothing, or nothing but such a model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f'{folder} is a file; a model is saved to a folder.')
    others = {path.name for path in folder.iterdir() if not is_weights(path.name) and path.suffix != PARTIAL}
    if CONFIG in others and others <= {CONFIG, CARD}:
        read_config(folder)
    elif others:
        raise ValueError(f'{folder} holds other files ({", ".join(sorted(others)[:3])}); give a new or empty folder.')


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
    return Path(name).match(WEIGHTS.format('*')) and Path(name).name == name


def field_names(model_class: type[nn.Module]) -> list[str]:
    """The names of a model's own arguments."""
    return [field.name for field in fields(model_class) if field.name not in {'parent', 'name'}]


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value.name if isinstance(value, jax.lax.Precision) else jnp.dtype(value).name


def _from_json(name: str, value: Any) -> Any:
    if name in {'dtype', 'param_dtype'} and value is not None:
        return jnp.dtype(value)
    return tuple(value) if isinstance(value, list) else value
