"""What torch.save writes, a zip archive since torch 1.6 and pickles in a row before, and the weights of torch.export.

Arrays are views of the mapped file.
"""

import zlib
from collections.abc import Mapping
from typing import Any

from convert.errors import ConversionError
from convert.files.arrays import read_json
from convert.files.dtypes import DTYPES
from convert.files.pickle_reader import Call, Data, Foreign, read_pickle
from convert.files.pickled_values import STORAGES, Storage, Storages, values, view
from convert.files.zip_directory import Record, quote, zip_records


def read_torch_zip(data: Data, records: Mapping[str, Record]) -> Any:
    """The tree that `torch.save` wrote. `data`: the mapped file; `records`: its `zip_records`.

    Raises: ConversionError, ValueError, LookupError.
    """
    pickles = [name for name in records if name == 'data.pkl' or name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise ConversionError(f'a torch archive with {len(pickles)} files data.pkl: {quote(pickles)}')
    folder = pickles[0].removesuffix('data.pkl')
    if f'{folder}constants.pkl' in records or any(name.startswith(f'{folder}code/') for name in records):
        raise ConversionError(
            'a TorchScript program. Where torch is, save its weights and convert those:\n'
            "    torch.save(torch.jit.load('model.pt', map_location='cpu').state_dict(), 'weights.pt')"
        )
    packed = [name for name, record in records.items() if record.deflated]
    if packed:
        raise ConversionError(f'a torch archive that was packed again ({quote(packed[0])} is compressed): unzip it')
    order = records.get(f'{folder}byteorder')
    if order and data[order.start : order.start + min(order.size, 16)] != b'little':
        raise ConversionError(_BIG_ENDIAN)
    program = records[pickles[0]]
    if program.checksum not in (0, zlib.crc32(memoryview(data)[program.start : program.start + program.size])):
        # torch writes 0 where it is told to compute none
        raise ConversionError('a damaged file: the checksum of its data.pkl is wrong. Copy or download it again')

    start = f'{folder}data/'
    places = {
        name.removeprefix(start): (record.start, record.size)
        for name, record in records.items()
        if name.startswith(start)
    }
    described, *_ = read_pickle(data, program.start, program.start + program.size)
    return values(described, len(data), Storages(data, places), load_storage)


_BIG_ENDIAN = 'saved on a big-endian machine: load it with torch and save it again on a little-endian one'


LEGACY = bytes.fromhex('8a0a6cfc9c46f9206aa85019')  # a number in a pickle, which opens files before torch 1.6
_QUANTIZED = {'torch.QInt8Storage': 1, 'torch.QUInt8Storage': 1, 'torch.QInt32Storage': 4}
_QUANTIZED |= {'torch.QUInt4x2Storage': 1, 'torch.QUInt2x4Storage': 1}


def read_legacy(data: Data) -> Any:
    """The tree that torch wrote before 1.6, or does still with `_use_new_zipfile_serialization=False`.

    Pickles follow one another: a number, a version, facts about the machine, the tree, the storages' keys. Then come
    the storages in that order, each behind the number of its numbers.
    """
    described, storages = _legacy(data)
    return values(described, len(data), storages, load_storage)


def load_storage(content: bytes) -> Foreign:
    """The one storage that torch writes into a file of its own, inside of a plain pickle."""
    described, storages = _legacy(content)
    match described:
        case Call('persistent', identity):
            return storages.find(identity)
    return Foreign('torch.storage')


def _legacy(data: Data) -> tuple[Any, Storages]:
    """What the pickled tree describes, and where its storages are."""
    end, parts, widths = 0, [], dict[str, int]()
    for _ in range(5):
        part, end, identities = read_pickle(data, end)
        parts.append(part)
        for identity in identities:
            match identity:
                case ('storage', Foreign(kind), str(key), *_):
                    widths[key] = STORAGES[kind].itemsize if kind in STORAGES else _QUANTIZED.get(kind, 0)
    _, version, machine, tree, keys = parts
    if version != 1001 or not isinstance(machine, dict) or not isinstance(keys, list):
        raise ConversionError(f"torch's older format of another version, {quote(version)}")
    if machine.get('little_endian') is not True:
        raise ConversionError(_BIG_ENDIAN)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        length = int.from_bytes(data[end : end + 8], 'little')
        if not isinstance(key, str) or key not in widths or end + 8 + length * widths[key] > len(data):
            raise ConversionError(f'its storage {quote(key)} is not there in full: cut off? Copy or download it again')
        places[key] = end + 8, length * widths[key]
        end += 8 + length * widths[key]
    return tree, Storages(data, places)


def read_plain_pickle(data: Data, start: int = 0) -> Any:
    """The tree of a file that pickle.dump or joblib.dump wrote, from `start` on."""
    return values(read_pickle(data, start)[0], len(data), Storages(data, {}), load_storage)


# torch.export's numbers for dtypes, in its schema of files.
_EXPORTED = dict(enumerate(['uint8', 'int8', 'int16', 'int32', 'int64', 'float16', 'float32', 'float64'], 1))
_EXPORTED |= {12: 'bool', 13: 'bfloat16'}
_EXPORTED_CONFIGS = ('data/weights/model_weights_config.json', 'data/constants/model_constants_config.json')
_EXPORTED_BEFORE_2_8 = ('serialized_constants.pt', 'serialized_state_dict.pt')


def is_exported(records: Mapping[str, Record]) -> bool:
    """Whether torch.export.save wrote the archive."""
    return any(name.endswith((_EXPORTED_CONFIGS[0], _EXPORTED_BEFORE_2_8[1])) for name in records)


def read_exported(data: Data, records: Mapping[str, Record]) -> Any:
    """The weights and buffers by name that torch.export.save put beside a program, which is not read.

    They are as many storages, and JSON that says what tensors are in them; before torch 2.8, archives of torch.save.
    """
    if any(record.deflated for record in records.values()):
        raise ConversionError('a torch.export archive that was packed again: unzip it')
    tree: dict[str, Any] = {}
    for start, _, size, *_ in (records[name] for name in _EXPORTED_BEFORE_2_8 if name in records):
        inside = zip_records(data[start : start + size])
        part = read_torch_zip(data, {name: each._replace(start=start + each.start) for name, each in inside.items()})
        if not isinstance(part, dict):
            raise ConversionError(f'a torch.export archive whose weights are {quote(part)}. {_EXPORTED_ADVICE}')
        tree |= part
    for config in (name for name in records if name.endswith(_EXPORTED_CONFIGS)):
        text = records[config]
        entries = read_json(data[text.start : text.start + text.size]).get('config')
        if not isinstance(entries, dict):
            raise ConversionError(
                f'a torch.export archive that says {quote(entries)} of its weights. {_EXPORTED_ADVICE}'
            )
        folder = config.rpartition('/')[0]
        for name, entry in entries.items():
            tree[name] = _exported(name, entry, data, records, folder)
    return tree


def _exported(name: str, entry: Any, data: Data, records: Mapping[str, Record], folder: str) -> Any:
    match entry:
        case {
            'path_name': str(path),
            'use_pickle': False,
            'tensor_meta': {
                'dtype': int(kind),
                'sizes': [*sizes],
                'strides': [*strides],
                'storage_offset': {'as_int': offset},
            },
        } if kind in _EXPORTED and f'{folder}/{path}' in records:
            dtype, record = DTYPES[f'torch.{_EXPORTED[kind]}'], records[f'{folder}/{path}']
            storage = Storage('torch.UntypedStorage', dtype, data, record.start, record.size)
            shape, steps = (
                tuple(axis.get('as_int') if isinstance(axis, dict) else None for axis in axes)
                for axes in (sizes, strides)
            )
            return view(storage, dtype, offset, shape, steps, len(data))
    raise ConversionError(f'a torch.export archive in which {quote(name)} is no plain tensor. {_EXPORTED_ADVICE}')


_EXPORTED_ADVICE = (
    'Where torch is, save its weights and convert those:\n'
    "    torch.save(torch.export.load('model.pt2').state_dict, 'weights.pt')"
)
