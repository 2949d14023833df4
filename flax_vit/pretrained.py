"""A model in a folder: `config.json` and the parameters in safetensors, for any JAX to read."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_vit.card import card
from flax_vit.folder import (
    CARD,
    CONFIG,
    MODELS,
    PARTIAL,
    WEIGHTS,
    appearing_whole,
    check_hashes,
    check_own,
    is_weights,
    model_of,
    new_config,
    read_config,
    sha256,
)
from flax_vit.hub import local_folder
from flax_vit.layers import pair
from flax_vit.overrides import POSITIONS, changes, initial
from flax_vit.resize import resize_positions
from flax_vit.sharding import RULES, shardings

__all__ = ['appearing_whole', 'from_pretrained', 'param_shapes', 'read_config', 'read_golden', 'save_pretrained']

GOLDEN = 'golden/'  # begins the names of arrays that are no parameters
DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # in safetensors' words


class PretrainedWarning(UserWarning):
    """The model is read, with something the caller should know: a new head, resized positions, a rounded dtype."""


def save_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    source: Any = None,
    golden: Mapping[str, np.ndarray] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write `model` and `variables` to `folder`, for `from_pretrained`.

    Kept with them: `source` (JSON), which says where they come from and is also written out in `README.md`, a model
    card; and `golden`, arrays to check the model by. A file of the weights has at most `max_shard_size` bytes, unless
    a single array has more.

    The configuration names the files of the weights and is replaced last, at once: whenever this is interrupted, the
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
    _check(_shapes(model), {path: np.shape(array) for path, array in flat.items()}, f'The variables of this {name}')
    check_own(folder)

    folder.mkdir(parents=True, exist_ok=True)
    arrays = flat | {f'{GOLDEN}{name}': array for name, array in (golden or {}).items()}
    hashes = {}
    for names in _shards({path: array.nbytes for path, array in arrays.items()}, max_shard_size):
        new = folder / WEIGHTS.format('new')
        with appearing_whole(new) as partial:
            save_file({path: np.ascontiguousarray(arrays[path]) for path in names}, partial)
        digest = sha256(new)
        hashes[new.replace(folder / WEIGHTS.format(digest[:12])).name] = digest
    config = new_config(model, hashes, source)
    (folder / CARD).unlink(missing_ok=True)  # before the model it speaks of is replaced
    with appearing_whole(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    if source is not None:
        with appearing_whole(folder / CARD) as partial:
            partial.write_text(card(config), encoding='utf-8')
    for path in folder.iterdir():  # the old weights, and what a killed save has left
        if path.suffix == PARTIAL or (is_weights(path.name) and path.name not in hashes):
            path.unlink()


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    sharding_rules: Sequence[tuple[str, PartitionSpec]] = RULES,
    check: bool | None = None,
    key: jax.Array | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the variables that `save_pretrained` wrote; neither torch nor the original checkpoint is needed.

    `folder` may also be the name of such a model on the Hugging Face Hub, 'owner/name': `revision` is its branch, tag
    or commit, `cache_dir` where to keep it.

    `overrides` are fields of the model. `param_dtype` casts the parameters. Another `num_classes` gives a new head, as
    `model.init` with `key` (a JAX random key) would, and 0 none; another `image_size` resizes DeepViT's positions; both
    with a PretrainedWarning. No other field may change the parameters' shapes.

    With a `mesh`, each parameter is split over its devices as `sharding_rules` say (see `flax_vit.sharding`). What goes
    to a device is read from the file for it alone: no device, and of several hosts none, ever has the whole model.

    `check=False` leaves out the comparison of the files with the saved sha256, for which they are read whole; it is
    also left out, unless asked for, when the mesh spans several hosts.

    Raises FileNotFoundError, and ValueError when the folder is not whole or the fields do not fit it.
    """
    folder = local_folder(folder, revision=revision, cache_dir=cache_dir)
    config = read_config(folder)
    model = model_of(config, overrides)
    cast = model.param_dtype if 'param_dtype' in overrides else None
    if cast is not None and jax.dtypes.canonicalize_dtype(cast) != cast:
        raise ValueError(f"param_dtype={cast} is not to be had: jax.config.update('jax_enable_x64', True) first.")
    saved = _shapes(model_of(config))
    wanted = _shapes(model) if overrides else saved
    plan = changes(saved, wanted, overrides)
    placed: dict[str, Any] = dict.fromkeys(wanted)
    if mesh is not None:
        structs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in wanted.items()}
        placed = shardings(structs, mesh, sharding_rules)
    if check or (check is None and not (mesh is not None and mesh.is_multi_process)):
        check_hashes(folder, config)

    with _opened(folder, config) as arrays:
        weights = {path: part for path, part in arrays.items() if not path.startswith(GOLDEN)}
        _check(saved, {path: tuple(part.get_shape()) for path, part in weights.items()}, f'What {folder} holds')
        dtypes = {path: DTYPES.get(part.get_dtype()) for path, part in weights.items()}
        if None in dtypes.values():
            strange = ', '.join(sorted(path for path, dtype in dtypes.items() if dtype is None))
            raise ValueError(f'{folder}: parameters are {", ".join(DTYPES.values())}; {strange} are something else.')
        notes = plan.notes
        if 'float64' in dtypes.values() and cast is None and not jax.config.read('jax_enable_x64'):
            notes.append(
                "The float64 parameters are rounded to float32, because JAX's 64-bit mode is off; "
                "jax.config.update('jax_enable_x64', True) keeps them."
            )
            model = model.clone(param_dtype=jnp.float32)
        if plan.resized:
            weights[POSITIONS] = resize_positions(weights[POSITIONS][:], model.image_size // model.patch_size)
        flat = {
            path: _place(weights[path], wanted[path], jnp.dtype(cast or dtypes[path]), placed[path])
            for path in sorted(plan.kept)
        }
    if plan.new:
        flat |= initial(model, plan.new, jax.random.key(0) if key is None else key, placed)
    for note in notes:
        warnings.warn(note, PretrainedWarning, stacklevel=2)
    return model, unflatten_dict(flat, sep='/')


def read_golden(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays that were kept to check the model in a folder by; none, when none were. Errors as of `read_config`."""
    with _opened(Path(folder), read_config(folder)) as arrays:
        golden = {path: part[:] for path, part in arrays.items() if path.startswith(GOLDEN)}
    return {path.removeprefix(GOLDEN): array for path, array in golden.items()}


def param_shapes(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of the model's parameters by path; nothing is computed."""
    model = model.clone(param_dtype=jnp.float32)  # of any dtype, also of one that JAX has switched off
    images = jax.ShapeDtypeStruct((1, *pair(model.image_size), model.channels), jnp.float32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)['params'])


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The same as they are written in a file."""
    return {'/'.join(('params', *path)): shape.shape for path, shape in param_shapes(model).items()}


def _check(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    problems = [
        f'  {path}: the shape is {shapes.get(path, "missing")}, expected {expected.get(path, "nothing")}'
        for path in sorted(expected.keys() | shapes.keys())
        if shapes.get(path) != expected.get(path)
    ]
    if problems:
        raise ValueError(f'{what} are not the parameters of this model:\n' + '\n'.join(problems))


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, in groups whose sizes add up to at most `limit`; what is larger is alone."""
    shards: list[list[str]] = [[]]
    full = 0
    for name, size in sizes.items():
        if shards[-1] and full + size > limit:
            shards.append([])
            full = 0
        shards[-1].append(name)
        full += size
    return shards


@contextmanager
def _opened(folder: Path, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All arrays of the mapped files, by name; what is sliced is read."""
    with ExitStack() as stack:
        arrays: dict[str, Any] = {}
        for file in config['weights']:
            try:
                opened = stack.enter_context(safe_open(folder / file['file'], framework='np'))
            except SafetensorError as error:
                raise ValueError(f'{folder / file["file"]} is damaged: {error}') from error
            arrays |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        yield arrays


def _place(part: Any, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    """An array of `shape` whose pieces are `part[index]`, read and cast one by one for the devices they go to."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)

    def read(index: Any) -> np.ndarray:
        return part[index].astype(dtype, copy=False)

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)
