"""A model in a folder: `config.json` and the parameters in safetensors, for any JAX to read."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from flax_vit.deep_vit import DeepViT
from flax_vit.layers import pair
from flax_vit.simple_vit import SimpleViT

FORMAT = 'flax_vit 1'
MODELS: Mapping[str, type[nn.Module]] = {'DeepViT': DeepViT, 'SimpleViT': SimpleViT}
GOLDEN = 'golden/'  # begins the names of arrays that are no parameters
PARTIAL = '.incomplete'  # ends the name of a file that is being written


def save_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    source: Any = None,
    golden: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `model` and `variables` to `folder`, for `from_pretrained`.

    Kept with them: `source` (JSON), which says where they come from, and `golden`, arrays to check the model by.
    The configuration names the file of the weights and is replaced last, at once: whenever this is interrupted, the
    folder holds the old model or the new one. Raises ValueError when the variables are not the model's, and when the
    folder holds anything else than such a model.
    """
    folder = Path(folder)
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise ValueError(f'save_pretrained takes a {" or a ".join(MODELS)}, not a {name}.')
    if set(variables) != {'params'}:
        raise ValueError(f"The variables of a {name} are {{'params': …}}, not a dict of {sorted(variables)}.")
    flat = {'/'.join(path): array for path, array in flatten_dict(variables).items()}
    _check(model, {path: np.shape(array) for path, array in flat.items()}, 'These variables')
    _check_own(folder)

    folder.mkdir(parents=True, exist_ok=True)
    new = folder / 'model-new.safetensors'
    arrays = flat | {f'{GOLDEN}{name}': array for name, array in (golden or {}).items()}
    with appearing_whole(new) as partial:
        save_file({path: np.ascontiguousarray(array) for path, array in arrays.items()}, partial)
    digest = _sha256(new)
    weights = new.replace(folder / f'model-{digest[:12]}.safetensors')
    config = {
        'format': FORMAT,
        'model': name,
        'fields': {field: _to_json(getattr(model, field)) for field in _field_names(type(model))},
        'weights': {'file': weights.name, 'sha256': digest},
        'source': source,
    }
    with appearing_whole(folder / 'config.json') as partial:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    for old in folder.glob('model-*.safetensors'):
        if old != weights:
            old.unlink()


def from_pretrained(folder: str | os.PathLike[str], **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the variables that `save_pretrained` wrote; neither torch nor the original checkpoint is needed.

    `overrides` are fields of the model that leave the shapes as they are (`dtype`, `precision`, `dropout`, …);
    `param_dtype` casts the parameters. Raises FileNotFoundError, and ValueError when the folder is not whole.
    """
    folder = Path(folder)
    config = read_config(folder)
    model_class = MODELS[config['model']]
    stored = {name: _from_json(name, value) for name, value in config['fields'].items()}
    strangers = sorted(set(overrides) - set(_field_names(model_class)))
    if strangers:
        raise ValueError(f'{model_class.__name__} has no field {", ".join(strangers)}.')
    model = model_class(**stored | {name: _from_json(name, value) for name, value in overrides.items()})

    weights = folder / config['weights']['file']
    if _sha256(weights) != config['weights']['sha256']:
        raise ValueError(f'{weights} is damaged: its sha256 is not the one in config.json.')
    with safetensors.safe_open(weights, framework='flax') as file:
        slices = {path: file.get_slice(path) for path in file.keys() if not path.startswith(GOLDEN)}  # noqa: SIM118
        _check(model, {path: tuple(part.get_shape()) for path, part in slices.items()}, str(weights))
        wide = any(part.get_dtype() == 'F64' for part in slices.values())
        if wide and 'param_dtype' not in overrides and not jax.config.read('jax_enable_x64'):
            warnings.warn(
                "The float64 parameters are rounded to float32, because JAX's 64-bit mode is off; "
                "jax.config.update('jax_enable_x64', True) keeps them.",
                stacklevel=2,
            )
            model = model.clone(param_dtype=jnp.float32)
        dtype = model.param_dtype if 'param_dtype' in overrides else None
        flat = {tuple(path.split('/')): jnp.asarray(file.get_tensor(path), dtype) for path in slices}
    return model, unflatten_dict(flat)


def read_golden(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays that were kept to check the model in a folder by; none, when none were. Errors as of `read_config`."""
    weights = Path(folder) / read_config(folder)['weights']['file']
    with safetensors.safe_open(weights, framework='np') as file:
        names = [name for name in file.keys() if name.startswith(GOLDEN)]  # noqa: SIM118
        return {name.removeprefix(GOLDEN): file.get_tensor(name) for name in names}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked `config.json` of a folder. Raises FileNotFoundError, and ValueError when it is not one of ours."""
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: {folder} is no folder that save_pretrained finished.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        own = config['format'] == FORMAT and config['model'] in MODELS
        own = own and isinstance(config['fields'], dict) and _is_weights(config['weights']['file'])
    except (ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise ValueError(f'{path} is not the configuration of a model that this version of flax_vit wrote.')
    return config


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


def param_shapes(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of the model's parameters by path; nothing is computed."""
    model = model.clone(param_dtype=jnp.float32)  # of any dtype, also of one that JAX has switched off
    images = jax.ShapeDtypeStruct((1, *pair(model.image_size), model.channels), jnp.float32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)['params'])


def _check(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    expected = {'/'.join(('params', *path)): shape.shape for path, shape in param_shapes(model).items()}
    problems = [
        f'  {path}: the shape is {shapes.get(path, "missing")}, expected {expected.get(path, "nothing")}'
        for path in sorted(expected.keys() | shapes.keys())
        if shapes.get(path) != expected.get(path)
    ]
    if problems:
        raise ValueError(f'{what} are not the parameters of this {type(model).__name__}:\n' + '\n'.join(problems))


def _check_own(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f'{folder} is a file; a model is saved to a folder.')
    others = [path.name for path in folder.iterdir() if not _is_weights(path.name) and path.suffix != PARTIAL]
    if others == ['config.json']:
        read_config(folder)
    elif others:
        raise ValueError(f'{folder} holds other files ({", ".join(sorted(others)[:3])}); give a new or empty folder.')


def _is_weights(name: str) -> bool:
    return name.startswith('model-') and name.endswith('.safetensors') and Path(name).name == name


def _field_names(model_class: type[nn.Module]) -> list[str]:
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


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
