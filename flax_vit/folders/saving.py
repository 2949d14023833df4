"""Writing a model's folder, so that at any moment it holds the old model or the new one."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save, save_file

from flax_vit.folders.card import card, card_hash, is_card
from flax_vit.folders.config import (
    CARD,
    CONFIG,
    GOLDEN,
    WEIGHTS,
    check_own,
    is_leftover,
    is_weights,
    new_config,
    read_config,
)
from flax_vit.folders.whole_files import appearing_whole, locked, sha256
from flax_vit.parameters import check_dtypes, check_variables
from flax_vit.stacking import is_stacked, unstack_layers


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

    The configuration names the files of the weights and is replaced last, at once: whenever this is interrupted, the
    folder holds the old model or the new one. On one machine, one save into a folder waits for another (not on
    Windows, nor on network file systems without locks); of several machines, let one save.

    Args:
        folder: The folder; it is made if need be.
        model: One of the models.
        variables: Its variables, {'params': ...}.
        source: Where they come from, in JSON. It is also written out in `README.md`, a model card, unless somebody has
            edited the one that is there.
        golden: Arrays by name, to check the model by.
        max_shard_size: Bytes of a file of the weights at most, unless a single array has more.

    Raises:
        ValueError: Before anything is written, when the variables are not the model's or not all on this host, when
            something cannot be kept, and when the folder holds anything else than such a model.
        OSError: When the disk is full, or does not take the files for another reason. The old model stays as it was.
    """
    folder = Path(folder)
    check_variables(model, variables)
    arrays = {path: np.asarray(array, order='C') for path, array in _flat(model, variables).items()}
    arrays |= _golden({} if golden is None else golden)
    if not isinstance(max_shard_size, Real) or max_shard_size < 1:
        raise ValueError(f'max_shard_size must be a number of bytes from 1 up, not {max_shard_size!r}.')
    config = new_config(model, source)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is a file; a model is saved to a folder.')

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as sync:
        check_own(folder)
        page = folder / CARD
        edited = page.exists() and not is_card(page.read_text(encoding='utf-8', errors='replace'), read_config(folder))
        try:
            for names in _shards({path: array.nbytes for path, array in arrays.items()}, max_shard_size):
                new = folder / WEIGHTS.format('new')
                with appearing_whole(new) as partial:
                    write_arrays(partial, {path: arrays[path] for path in names})
                digest = sha256(new)
                name = new.replace(folder / WEIGHTS.format(digest[:12])).name
                config['weights'].append({'file': name, 'sha256': digest})
            config['card'] = card_hash(card(config))
            sync()  # what the configuration names is there
            with ExitStack() as files:  # all is written before anything is replaced: the last first, as it leaves them
                if source is not None and not edited:
                    files.enter_context(appearing_whole(page)).write_text(card(config), encoding='utf-8', newline='\n')
                text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
                files.enter_context(appearing_whole(folder / CONFIG)).write_text(text, encoding='utf-8', newline='\n')
                if not edited:
                    page.unlink(missing_ok=True)  # before the model it speaks of is replaced
        finally:
            sync()  # before the files go that the old one names
            _tidy(folder)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. OSError when the disk does not take it, which safetensors says in words only."""
    try:
        save_file(dict(arrays), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        code = re.search(r'\(os error (\d+)\)', str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _tidy(folder: Path) -> None:
    """Remove the weights that the folder's configuration does not name, and what a killed save has left."""
    config = read_config(folder) if (folder / CONFIG).exists() else {'weights': []}
    named = {file['file'] for file in config['weights']}
    for path in folder.iterdir():
        if is_leftover(path.name) or (is_weights(path.name) and path.name not in named):
            path.unlink()


def _flat(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables by path, block after block. ValueError for what cannot be written."""
    what = f'The variables of this {type(model).__name__}'
    far = [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, array in jax.tree_util.tree_leaves_with_path(variables)
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)
    ]
    if far:
        raise ValueError(
            f'{what} lie on several hosts ({far[0]}, …), and one writes the folder: bring them together first, with '
            'jax.experimental.multihost_utils.process_allgather(variables, tiled=True); see docs/devices.md.'
        )
    variables = jax.tree.map(np.asarray, variables)  # nothing is computed on the devices, which may be of several hosts
    flat = flatten_dict(unstack_layers(variables) if is_stacked(model) else variables)
    check_dtypes({'/'.join(path): array.dtype.name for path, array in flat.items()}, what)
    return {'/'.join(path): array for path, array in flat.items()}


def _golden(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The golden arrays by the names they have in the file. ValueError for what cannot be written."""
    if not isinstance(golden, Mapping):
        raise ValueError(f'golden must be arrays by name, not {golden!r}.')
    arrays = {f'{GOLDEN}{name}': np.asarray(array, order='C') for name, array in golden.items()}
    try:
        save({name: np.empty(0, array.dtype) for name, array in arrays.items()})
    except SafetensorError as error:
        raise ValueError(f'golden must be arrays that safetensors can keep: {error}') from error
    return arrays


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
