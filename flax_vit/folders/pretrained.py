"""A model in a folder: `config.json` and the parameters in safetensors, for any JAX to read."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from flax_vit.folders.config import GOLDEN, check_hashes, model_of, read_config
from flax_vit.folders.hub import local_folder
from flax_vit.folders.overrides import changes, initial, resize_positions
from flax_vit.mesh import Rules
from flax_vit.parameters import check_dtypes, check_shapes, saved_shapes
from flax_vit.sharding import check_mesh, default_rules, shardings
from flax_vit.stacking import is_stacked, one_by_one, stacked

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # in safetensors' words


class PretrainedWarning(UserWarning):
    """The model is read, with something the caller should know: a new head, resized positions, a rounded dtype, …"""


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    sharding_rules: Rules | None = None,
    check: bool | None = None,
    key: jax.Array | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the variables that `save_pretrained` wrote; neither torch nor the original checkpoint is needed.

    Another process may save to the folder meanwhile.

    Args:
        folder: A path, or the name of such a model on the Hugging Face Hub, 'owner/name'.
        mesh: Split each parameter over its devices. What goes to a device is read from the file for it alone: no
            device, and no host of several, ever has the whole model.
        sharding_rules: How parameters are split, as `shardings` takes it.
        check: False leaves out the comparison of the files with the saved sha256, for which they are read whole. It is
            also left out, unless asked for, when the mesh spans several hosts.
        key: JAX's random key for the parameters of a new head.
        revision: Of a model on the hub: the branch, tag or commit.
        cache_dir: Where to keep a model of the hub.
        **overrides: Fields of the model. `param_dtype` casts the parameters. Another `num_classes` gives a new head,
            as `model.init` with `key` would, and 0 none; another `image_size` resizes learned positions; other `heads`
            of a SimpleViT, another `pool`, make another function of the same weights; all with a PretrainedWarning.
            What else would change the parameters' shapes is refused, and so are other patches.

    Returns:
        The model and its variables, {'params': ...}.

    Raises:
        FileNotFoundError: When there is no such folder, here or on the hub.
        OSError: When its files, or the hub, cannot be read.
        ValueError: When the folder is not whole, or the arguments do not fit it.
        ImportError: When it is on the hub, and the hub's library is missing.
    """
    if mesh is not None:
        check_mesh(mesh, default_rules() if sharding_rules is None else sharding_rules)
    elif sharding_rules is not None:
        raise ValueError('sharding_rules say how parameters are split over the devices of a mesh: give mesh, too.')
    if key is not None:
        _check_key(key)
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder must be a path, or a name on the Hugging Face Hub ('owner/name'), not {folder!r}.")
    folder = local_folder(folder, revision=revision, cache_dir=cache_dir)
    model_of(read_config(folder), overrides)  # what is wrong with them is said before large files are read
    if check is None:
        check = mesh is None or not mesh.is_multi_process
    with _opened(folder, check=check) as (config, arrays):
        saved_model, model = model_of(config), model_of(config, overrides)
        weights, dtypes = _weights(folder, saved_model, arrays)
        cast = model.param_dtype if 'param_dtype' in overrides else None
        model, rounding = _in_this_mode(model, overrides, dtypes)
        saved = saved_shapes(saved_model.clone(scan_layers=True) if is_stacked(model) else one_by_one(saved_model))
        wanted = saved_shapes(model) if overrides else saved
        old_and_new = {name: (getattr(saved_model, name), getattr(model, name)) for name in overrides}
        plan = changes(type(model), saved, wanted, old_and_new)
        placed: dict[str, Any] = dict.fromkeys(wanted)
        if mesh is not None:
            structs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in wanted.items()}
            placed = shardings(structs, mesh, sharding_rules)
        if is_stacked(model):
            weights, dtypes = _joined(weights, Stacked), _joined(dtypes, lambda kinds: jnp.result_type(*kinds).name)
        if plan.resized:
            table = weights[plan.resized][:]
            weights[plan.resized] = resize_positions(table, saved_model.grid, model.grid)
        flat = {
            path: _place(weights[path], wanted[path], jnp.dtype(cast or dtypes[path]), placed[path])
            for path in sorted(plan.kept)
        }
    if plan.new:
        flat |= initial(model, plan.new, jax.random.key(0) if key is None else key, placed)
    for note in plan.notes + rounding:
        warnings.warn(note, PretrainedWarning, stacklevel=2)
    return model, unflatten_dict(flat, sep='/')


def read_golden(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays that were kept to check the model in a folder by; none, when none were. Errors as of `read_config`."""
    with _opened(Path(folder), check=False) as (_, arrays):
        golden = {path: part[()] for path, part in arrays.items() if path.startswith(GOLDEN)}
    return {path.removeprefix(GOLDEN): array for path, array in golden.items()}


@contextmanager
def _opened(folder: Path, *, check: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The configuration, and all arrays of the mapped files by name; what is sliced is read. `check`: the sha256."""
    with ExitStack() as stack:
        while True:
            config = read_config(folder)
            try:
                if check:
                    check_hashes(folder, config)
                arrays = _mapped(folder, config, stack)
                break
            except FileNotFoundError:
                # Another process may have saved a model meanwhile, and removed the files of this one.
                there = all((folder / file['file']).exists() for file in config['weights'])
                if not there and read_config(folder) == config:
                    raise
        yield config, arrays


def _mapped(folder: Path, config: Mapping[str, Any], stack: ExitStack) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for file in config['weights']:
        try:
            opened = stack.enter_context(safe_open(folder / file['file'], framework='np'))
        except SafetensorError as error:
            raise ValueError(f'{folder / file["file"]} is damaged: {error}') from error
        arrays |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return arrays


def _check_key(key: Any) -> None:
    try:
        jax.random.key_data(key)
    except TypeError as error:
        raise ValueError(f'key must be a random key of JAX, such as jax.random.key(0), not {key!r}.') from error


def _weights(folder: Path, model: nn.Module, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters among the arrays, and their dtypes, by path. ValueError unless they are those of `model`."""
    weights = {path: part for path, part in arrays.items() if not path.startswith(GOLDEN)}
    shapes = {path: tuple(part.get_shape()) for path, part in weights.items()}
    check_shapes(saved_shapes(one_by_one(model)), shapes, f'What {folder} holds')
    dtypes = {path: DTYPES.get(part.get_dtype(), part.get_dtype()) for path, part in weights.items()}
    check_dtypes(dtypes, f'What {folder} holds')
    return weights, dtypes


def _in_this_mode(
    model: nn.Module, overrides: Mapping[str, Any], dtypes: Mapping[str, str]
) -> tuple[nn.Module, list[str]]:
    """The model as JAX's 64-bit mode lets it be, and a note where that rounds. ValueError if float64 was asked for."""
    if jax.config.read('jax_enable_x64'):
        return model, []
    wide = [name for name in ('dtype', 'param_dtype') if str(getattr(model, name)) == 'float64']
    for name in sorted(overrides.keys() & wide):
        raise ValueError(f"{name}=float64 needs 64-bit mode: jax.config.update('jax_enable_x64', True).")
    rounded = ['computations'] if 'dtype' in wide else []
    rounded += ['parameters'] if 'param_dtype' not in overrides and 'float64' in dtypes.values() else []
    note = (
        f"The float64 {' and '.join(rounded)} are rounded to float32, because JAX's 64-bit mode is off; "
        "jax.config.update('jax_enable_x64', True) keeps them."
    )
    narrow: dict[str, Any] = dict.fromkeys(wide, jnp.float32)
    return model.clone(**narrow), [note] if rounded else []


@dataclass(frozen=True)
class Stacked:
    """One array of every block, read as one with a first axis more."""

    parts: Sequence[Any]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.stack([part[index[1:]] for part in self.parts[index[0]]])


def _joined(values: Mapping[str, Any], join: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """By path, with one value for all blocks."""
    flat = {tuple(path.split('/')): value for path, value in values.items()}
    return {'/'.join(path): value for path, value in stacked(flat, lambda _, blocks: join(blocks)).items()}


def _place(part: Any, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    """An array of `shape` whose pieces are `part[index]`, read and cast one by one for the devices they go to."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    pieces: dict[str, np.ndarray] = {}  # several devices may hold the same one

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in pieces:
            pieces[str(index)] = part[index].astype(dtype, copy=False)
        return pieces[str(index)]

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)  # type: ignore[arg-type]  # the index is never None
