"""A file or folder -> a tree of plain containers with lazily mapped arrays. No code in a file is ever run.

What a file is, its content tells, not its name. Arrays are read-only views of the mapped file: converting needs no
memory for them, and the file must not be changed while they are in use.
"""

import os
import pickle
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.files.arrays import JSON_BYTES, read_json, read_npz, read_safetensors
from convert.files.torch_archive import DTYPES, Foreign, check_expanded, check_size, read_torch_zip
from convert.files.zip_directory import quote, zip_records

__all__ = ['Checkpoint', 'Foreign', 'array', 'read']


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `tree`: dict, list, tuple, str, bytes, numbers, bool, None, numpy arrays and Foreign."""

    tree: Any
    format: str  # for people: 'torch zip archive', 'safetensors, 2 shards', 'numpy npz', ...
    files: tuple[Path, ...]  # all that were read
    metadata: Mapping[str, str] = field(default_factory=dict)  # what safetensors has under '__metadata__'


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file, in a shards' index, or in a folder that holds one of them and no other.

    Raises: ConversionError, saying what the file looks like and what to do; OSError (FileNotFoundError, ...).
    """
    if re.match(r'[a-z][a-z0-9+.-]+://', os.fspath(path)):
        raise ConversionError(f'{os.fspath(path)!r} is an address, not a file: download it, and give its path.')
    return _read(Path(path).expanduser())


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
                    f'{path}, beside the weights, cannot be read ({error}): mend it, or take it away.'
                ) from error
    return said


def array(tensor: Any) -> np.ndarray:
    """A torch tensor -> an array of the same dtype, shape and bits: a view where the tensor is on the CPU.

    bfloat16 and float8 get ml_dtypes' types. Raises: ConversionError for sparse, quantized and meta tensors.
    """
    dtype = DTYPES.get(str(tensor.dtype))
    if dtype is None:
        raise ConversionError(f'a tensor of {tensor.dtype}, which has no counterpart here')
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if dtype.type.__module__ == 'numpy':
            return np.asarray(tensor.numpy())
        import torch

        bits = tensor.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
        return np.asarray(bits.numpy().view(dtype))
    except (TypeError, RuntimeError) as error:
        raise ConversionError(f'a tensor without plain numbers in it: {error}') from error


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
        path = _only_checkpoint(path)
    _refuse_parts({path.name})
    if path.stat().st_size == 0 or not path.is_file():  # a pipe would be waited for without end
        raise ConversionError('an empty file, or no file at all: copy or download it again')
    with path.open('rb') as file:
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
    head = data[:512]
    if head.startswith((b'PK\3\4', b'PK\5\6')):
        return _read_zip(path, data)
    if head[8:9] == b'{' and b'\0' in head[:8]:
        tree, metadata = read_safetensors(data)
        return Checkpoint(tree, 'safetensors', (path,), metadata)
    if not shard and head.lstrip().startswith(b'{'):
        return _read_shards(path, read_json(data[: JSON_BYTES + 1]))
    if _TORCH_MAGIC in head[:32]:
        return Checkpoint(_read_legacy(path), 'torch legacy file (read by torch)', (path,))
    if head[257:262] == b'ustar':
        raise ConversionError(f'a tar archive: unpack it first. If it is one that torch wrote before 2017: {_RESAVE}')
    for signature, advice in _OTHERS.items():
        if head.lower().startswith(signature):
            raise ConversionError(advice)
    if data[-8:] == _TENSORFLOW_INDEX:
        raise ConversionError('the index of a TensorFlow checkpoint, which holds no PyTorch weights')
    raise ConversionError(f'no checkpoint of a known format; it begins with {head[:16]!r}')


_TORCH_MAGIC = b'\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19'  # a pickled number that opens files before torch 1.6
_TENSORFLOW_INDEX = 0xDB4775248B80FB57.to_bytes(8, 'little')
_STATE_DICT = """Where its classes are, and if you trust the file, save its weights alone and convert those:
    model = torch.load('x.pt', weights_only=False)
    torch.save(model.state_dict(), 'weights.pt')"""
_RESAVE = 'save it again with torch (torch.save(state_dict, path)); such a file is read without torch'
_PACKED = 'a compressed file: unpack it first'
_PICKLE = f'a pickle that torch.save did not write. {_STATE_DICT}'
_PAGE = 'a web page, saved in place of the file: download the file itself'
_OTHERS = {  # how a file begins, in lower case -> what to say of it
    b'version https://git-lfs': 'a git-lfs pointer to the file, not the file: run `git lfs pull`',
    b'<!doctype': _PAGE,
    b'<html': _PAGE,
    b'<?xml': _PAGE,
    b'\x89hdf\r\n': 'an HDF5 file (Keras?), which holds no PyTorch weights',
    b'model_checkpoint_path': 'the note beside a TensorFlow checkpoint, which holds no PyTorch weights',
    b'\x93numpy': 'a single numpy array, without a name: numpy.savez writes many with theirs',
    b'gguf': 'a GGUF file (llama.cpp), which holds no vision transformer of vit-pytorch',
    b'\x1f\x8b': _PACKED,
    b'bzh': _PACKED,
    b'\xfd7zxz': _PACKED,
    b'\x28\xb5\x2f\xfd': _PACKED,
    b'7z\xbc\xaf': _PACKED,
    b'rar!': _PACKED,
    b'\x80\x02': _PICKLE,
    b'\x80\x03': _PICKLE,
    b'\x80\x04': _PICKLE,
    b'\x80\x05': _PICKLE,
    b'\0' * 64: 'zeros where the data should be, an interrupted download? Copy or download it again',
}


def _read_zip(path: Path, data: mmap) -> Checkpoint:
    records = zip_records(data)
    if any(name == 'data.pkl' or name.endswith('/data.pkl') for name in records):
        tree = read_torch_zip(data, records)
        if isinstance(tree, Foreign):
            raise ConversionError(f'holds a whole object of the class {quote(tree.name)}, no weights. {_STATE_DICT}')
        return Checkpoint(tree, 'torch zip archive', (path,))
    if records and all(name.endswith('.npy') for name in records):
        return Checkpoint(read_npz(data, records), 'numpy npz', (path,))
    raise ConversionError(f'a zip archive, neither from torch.save nor an npz: it holds {quote(list(records))}')


def _read_shards(index: Path, content: dict[str, Any]) -> Checkpoint:
    """The tensors of all shards that an index names: each where the index says, and no others."""
    owners = content.get('weight_map')
    if not isinstance(owners, dict) or not owners or not all(isinstance(name, str) for name in owners.values()):
        raise ConversionError('JSON without weights in it (nor a "weight_map", as an index of shards has)')
    tree: dict[str, Any] = {}
    parts = []
    for name in sorted(set(owners.values())):
        part = _read(_beside(index, name), shard=True)
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


def _beside(index: Path, name: str) -> Path:
    """The file of that name in the index's folder. A link may lead only to where the hub's cache keeps its files."""
    folder = index.parent.resolve()
    if name in ('', '.', '..') or not set(name).isdisjoint('/\\\0'):
        raise ConversionError(f'its shard {quote(name)} is not the plain name of a file beside it')
    if (folder / name).resolve().parent not in (folder, folder.parent.parent / 'blobs'):
        raise ConversionError(f'its shard {quote(name)} is a link to another folder')
    return index.parent / name


def _only_checkpoint(folder: Path) -> Path:
    """The one index or checkpoint file in a folder, beside what trainers put there and the shards of the index."""
    names = {path.name for path in folder.iterdir()}
    _refuse_parts(names)
    if 'saved_model.pb' in names or any(name.endswith('.data-00000-of-00001') for name in names):
        raise ConversionError('a TensorFlow checkpoint, which holds no PyTorch weights')
    if {'data.pkl', 'data'} <= names:
        raise ConversionError(
            'the content of a torch zip archive: give the archive, or zip the folder without compression'
        )
    found = {name for name in names if name.lower().endswith(_SUFFIXES) and not re.match(_BESIDE_WEIGHTS, name)}
    for name in sorted(found):
        if name.endswith('.index.json'):
            with (folder / name).open('rb') as file:
                owners = read_json(file.read(JSON_BYTES + 1)).get('weight_map')
            found -= set(map(str, owners.values())) if isinstance(owners, dict) else set()
    if len(found) != 1:
        raise ConversionError(f'a folder of {len(found)} checkpoints, give the one to convert: {sorted(found)}')
    return folder / found.pop()


def _refuse_parts(names: set[str]) -> None:
    """Files that hold a part of each tensor."""
    if '.metadata' in names or any(name.endswith('.distcp') for name in names):
        raise ConversionError(
            'the parts that torch.distributed.checkpoint saved. Where torch is, merge them and convert the result:\n'
            '    python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt'
        )
    if any(re.match(r'zero_pp_rank_|global_step\d|.*_optim_states\.pt$', name) for name in names):
        raise ConversionError(
            'the parts that DeepSpeed ZeRO saved. Merge them with the script it put there, and convert the result:\n'
            '    python zero_to_fp32.py . weights.pt'
        )


_SUFFIXES = ('.pt', '.pth', '.bin', '.ckpt', '.t7', '.tar', '.safetensors', '.npz', '.index.json')
_BESIDE_WEIGHTS = r'(optimizer|scheduler|scaler|training_args|rng_state|random_states)[_0-9]*\.'  # trainers' own files
_TORCH_REFUSES = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, ValueError, TypeError, LookupError, EOFError),
    *(AttributeError, AssertionError, ArithmeticError, MemoryError, ImportError),
)


def _read_legacy(path: Path) -> Any:
    """The tree of a file that torch wrote before 1.6, or does still with `_use_new_zipfile_serialization=False`."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"torch's older format, which torch reads: pip install torch. Or {_RESAVE}") from error
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 10):
        # CVE-2025-32434, CVE-2026-24747: before, a file could run code in spite of weights_only
        raise ConversionError(f"torch's older format, which torch reads safely from 2.10 on. Update it, or {_RESAVE}")
    try:
        with warnings.catch_warnings(action='ignore'):  # of pickle protocols and storage classes, nothing to act on
            tree = torch.load(path, map_location='cpu', weights_only=True)
    except _TORCH_REFUSES as error:
        said = quote(str(error).split('WeightsUnpickler error: ')[-1])
        raise ConversionError(f"torch's older format, which torch refuses to read: {said}. {_STATE_DICT}") from error
    check_size(tree, path.stat().st_size)
    return _plain(tree, path.stat().st_size)


def _plain(value: Any, file_size: int) -> Any:
    """What torch.load gave, in the kinds of values that a Checkpoint has."""
    if hasattr(value, 'detach'):
        try:
            view = array(value)
        except ConversionError:
            return Foreign('torch.Tensor')
        check_expanded(view.shape, view.nbytes, file_size)
        view.flags.writeable = False
        return view
    if isinstance(value, dict):
        return {key: _plain(part, file_size) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_plain(part, file_size) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    known = value is None or isinstance(value, str | bytes | bool | int | float)
    return value if known else Foreign(f'{type(value).__module__}.{type(value).__qualname__}')
