"""What lies in a model's folder: `config.json`, which names the files of the weights, and which files are its own."""

import json
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_vit.architectures import classes, defaults_of, name_of
from flax_vit.folders.whole_files import PARTIAL, sha256

FORMAT = 'flax_vit 2'
ONE_FILE = 'flax_vit 1'  # the format before weights could be in several files; read, no longer written
CONFIG = 'config.json'
CARD = 'README.md'  # the Hugging Face Hub shows it as the model's page
WEIGHTS = 'model-{}.safetensors'
GOLDEN = 'golden/'  # begins the names of arrays that are no parameters
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
    if Path(folder).is_file():
        raise FileNotFoundError(
            f'{folder} is a file, not a folder that save_pretrained wrote: a PyTorch checkpoint is for from_torch.'
        )
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: {folder} is not a folder that save_pretrained finished.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if config['format'] == ONE_FILE:
            config['weights'] = [config['weights']]
        own = config['format'] in {ONE_FILE, FORMAT} and bool(config['weights']) and 'source' in config
        own = own and all(is_weights(file['file']) and isinstance(file['sha256'], str) for file in config['weights'])
        reason = '.'
        model_of(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        own, reason = False, f' ({type(error).__name__}: {error}).'
    if not own:
        raise ValueError(f'{path} is not the configuration of a model that this version of flax_vit wrote{reason}')
    return config


def origin(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts that a configuration has of its source, by name, and the certificate of `verify`, empty without one.

    `save_pretrained` takes anything for a source.
    """
    source = config['source']
    facts = dict(source) if isinstance(source, dict) else {'note': source} if source is not None else {}
    verified = facts.get('verified')
    if isinstance(verified, dict) and {'time', 'verdict', 'criterion'} <= verified.keys():
        return {name: value for name, value in facts.items() if name != 'verified'}, verified
    return facts, {}


def new_config(model: nn.Module, source: Any) -> dict[str, Any]:
    """The configuration of a model, as it will be read; its list of weights is still empty.

    ValueError for a field that would not be read as it is, and for a source that is not JSON.
    """
    saved = {}
    for name in defaults_of(type(model)):
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
    names = list(defaults_of(model_class))
    for name in overrides or {}:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f'do you mean {near[0]}?' if near else f'its fields are {", ".join(names)}.'
            raise ValueError(f'{model_class.__name__} has no field {name}; {hint}')
    chosen = config['fields'] | (overrides or {})
    return model_class(**{name: _from_json(name, value) for name, value in chosen.items()})


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
