"""A file or folder -> a tree of plain containers with lazily mapped arrays. No code in a file is ever run.

What a file is, its content tells, not its name. Arrays are read-only views of the mapped file: converting needs no
memory for them, and the file must not be changed while they are in use.
"""

import os
import re
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.files.arrays import JSON_BYTES, objects_in_npy, read_json, read_npz, read_safetensors
from convert.files.folders import beside, only_checkpoint
from convert.files.other_files import refuse_archive, refuse_file, refuse_parts
from convert.files.pickle_reader import Data, Foreign
from convert.files.remote import local_path
from convert.files.torch_archive import (
    LEGACY,
    is_exported,
    read_exported,
    read_legacy,
    read_plain_pickle,
    read_torch_zip,
)
from convert.files.unpacking import unpacked, unpacked_file
from convert.files.zip_directory import quote, zip_records


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `tree`: dict, list, tuple, str, bytes, numbers, bool, None, numpy arrays and Foreign."""

    tree: Any
    format: str  # for people: 'torch zip archive', 'safetensors, 2 shards', 'numpy npz', ...
    files: tuple[Path, ...]  # all that were read
    metadata: Mapping[str, str] = field(default_factory=dict)  # what safetensors has under '__metadata__'


def read(source: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file, in a shards' index, or in a folder that holds one of them and no other.

    Args:
        source: A path, or what `remote.local_path` makes one of.

    Returns:
        What is in it, lazily.

    Raises:
        ConversionError: Saying what the file looks like and what to do.
        OSError: FileNotFoundError and the like.
    """
    return _read(local_path(source))


def read_beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is said of a checkpoint outside of its tree: in a config.json beside it, in safetensors' metadata.

    Raises: ConversionError for a config.json that is none.
    """
    said: dict[str, Any] = {}
    for name, words in checkpoint.metadata.items():
        if words.startswith('{'):
            with suppress(ConversionError, ValueError, RecursionError):
                said[name] = read_json(words.encode())
    for folder in {file.parent for file in checkpoint.files}:
        path = folder / 'config.json'
        if path.is_file():
            try:
                with path.open('rb') as file:
                    said[path.name] = read_json(file.read(JSON_BYTES + 1))
            except (ConversionError, ValueError, RecursionError) as error:
                raise ConversionError(
                    f'{path}, beside the weights, cannot be read ({error}): repair or remove it.'
                ) from error
    return said


def _read(path: Path, shard: bool = False) -> Checkpoint:
    """A file, its name put before each error. A shard may not itself be an index."""
    try:
        return _read_file(path, shard)
    except ConversionError as error:
        raise ConversionError(f'{str(path)!r}: {error}') from error
    except (ValueError, LookupError, OverflowError, RecursionError, MemoryError, struct.error, zlib.error) as error:
        said = f'{type(error).__name__}: {quote(str(error))}'
        raise ConversionError(f'{str(path)!r}: damaged, or not what it seems ({said})') from error


def _read_file(path: Path, shard: bool) -> Checkpoint:
    if path.is_dir() and not shard:
        path = only_checkpoint(path)
    refuse_parts({path.name}, str(path.parent))
    if path.stat().st_size == 0 or not path.is_file():  # a pipe would be waited for without end
        raise ConversionError('an empty file, or no file at all: copy or download it again')
    with path.open('rb') as file:
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
    if not shard and b'\0' not in data[:8] and data[:512].lstrip().startswith(b'{'):
        return _read_shards(path, read_json(data[: JSON_BYTES + 1]))
    return _read_data(data, path)


def _read_data(data: Data, path: Path, packed: str = '') -> Checkpoint:
    """What is in a file's content; `packed`: how the content was, in the file."""
    head = data[:512]
    metadata: Mapping[str, str] = {}
    if head.startswith((b'PK\3\4', b'PK\5\6')):
        records = zip_records(data)
        names = [name for name in records if not name.endswith('/')]
        if any(name == 'data.pkl' or name.endswith('/data.pkl') for name in names):
            tree, form = read_torch_zip(data, records), 'torch zip archive'
        elif is_exported(records):
            tree, form = read_exported(data, records), 'torch.export archive'
        elif names and all(name.endswith('.npy') for name in names):
            tree, form = read_npz(data, records), 'numpy npz'
        elif len(names) == 1 and not packed:
            return _read_packed(bytes(unpacked(data, records)[names[0]]), path, f'{quote(names[0])} in a zip archive')
        else:
            refuse_archive(records)
    elif head[8:9] == b'{' and b'\0' in head[:8]:
        (tree, metadata), form = read_safetensors(data), 'safetensors'
    elif LEGACY in head[:32]:
        tree, form = read_legacy(data), "torch's older format"
    elif re.match(rb'\x80[\2-\5]', head):
        tree, form = read_plain_pickle(data), 'pickle'
    elif head.startswith(b'\x93NUMPY'):
        start = objects_in_npy(data)
        if start is None:
            raise ConversionError('a single numpy array, without a name: numpy.savez writes many with theirs')
        tree, form = read_plain_pickle(data, start), 'numpy npy'
    else:
        if not packed and (inner := unpacked_file(data)) is not None:
            return _read_packed(inner, path, 'compressed')
        refuse_file(head, data[-8:])
    if isinstance(tree, Foreign):
        raise ConversionError(
            f'holds a whole object of the class {quote(tree.name)}, no weights. Where its classes are, and if you '
            'trust the file, save its weights alone and convert those:\n'
            f'    model = {_LOADS.get(form, _TORCH_LOADS).format(str(path))}\n'
            "    torch.save(model.state_dict(), 'weights.pt')"
        )
    return Checkpoint(tree, f'{form}, {packed}' if packed else form, (path,), metadata)


def _read_packed(content: bytes, path: Path, packed: str) -> Checkpoint:
    if not content:
        raise ConversionError(f'{packed}: nothing')
    try:
        return _read_data(content, path, packed)
    except ConversionError as error:
        raise ConversionError(f'{packed}: {error}') from error


_TORCH_LOADS = "torch.load({!r}, map_location='cpu', weights_only=False)"
_LOADS = {
    'pickle': 'joblib.load({!r})  # or pickle.load, of an open file',
    'numpy npy': 'numpy.load({!r}, allow_pickle=True).item()',
}


def _read_shards(index: Path, content: dict[str, Any]) -> Checkpoint:
    """The tensors of all shards that an index names: each where the index says, and no others."""
    owners = content.get('weight_map')
    if not isinstance(owners, dict) or not owners or not all(isinstance(name, str) for name in owners.values()):
        raise ConversionError('JSON without weights in it (nor a "weight_map", as an index of shards has)')
    tree: dict[str, Any] = {}
    parts = []
    for name in sorted(set(owners.values())):
        part = _read(beside(index, name), shard=True)
        said = {key for key, owner in owners.items() if owner == name}
        found = part.tree.keys() if isinstance(part.tree, dict) else set()
        if found != said:
            names = [f'- {quote(key)}' for key in said - found] + [f'+ {quote(key)}' for key in found - said]
            raise ConversionError(
                f'{quote(name)} lacks (-) or has beyond the index (+):\n'
                + '\n'.join(sorted(names, key=lambda line: line[2:])[:20])
            )
        tree |= part.tree
        parts.append(part)
    files = (index, *(file for part in parts for file in part.files))
    return Checkpoint({key: tree[key] for key in owners}, f'{parts[0].format}, {len(parts)} shards', files)
