"""Files that are arrays by name and nothing else: safetensors and npz. Arrays are views of the mapped file."""

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.files.dtypes import DTYPES, KINDS, native
from convert.files.pickle_reader import Data, Foreign
from convert.files.unpacking import unpacked
from convert.files.zip_directory import Record, quote

JSON_BYTES = 16 << 20  # the largest safetensors header or index of shards that is read: some 100,000 tensors
HEADER_BYTES = 10_000  # the longest header of an array in an npz


def read_json(text: bytes) -> dict[str, Any]:
    """A JSON object without a name twice; {} for other JSON. Raises: ConversionError, ValueError, RecursionError."""
    if len(text) > JSON_BYTES:
        raise ConversionError(f'more than {JSON_BYTES} bytes of JSON')
    value = json.loads(text.decode(), object_pairs_hook=_unique)
    return value if isinstance(value, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ConversionError('JSON with a name twice')
    ''.join(found).encode()  # half a surrogate pair is no name
    return found


_SAFETENSORS = {'BOOL': 'bool', 'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'}
_SAFETENSORS |= {'F8_E4M3FNUZ': 'float8_e4m3fnuz', 'F8_E5M2FNUZ': 'float8_e5m2fnuz', 'F8_E8M0': 'float8_e8m0fnu'}
_SAFETENSORS |= {'C64': 'complex64'} | {f'F{bits}': f'float{bits}' for bits in (16, 32, 64)}
_SAFETENSORS |= {
    f'{sign}{bits}': f'{kind}{bits}' for sign, kind in (('I', 'int'), ('U', 'uint')) for bits in (8, 16, 32, 64)
}


def read_safetensors(data: Data) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays by name in the header's order, and the file's `__metadata__`.

    The format's rules, all held: 8 bytes for the header's length, JSON, then the numbers; the tensors' places follow
    each other from the first byte to the last, and each is as long as its shape and dtype say.
    """
    (size,) = struct.unpack_from('<Q', data)
    if size > min(JSON_BYTES, len(data) - 8):
        raise ConversionError(f'safetensors whose header claims {size} bytes of {len(data)}: cut off?')
    header = read_json(data[8 : 8 + size])
    metadata = header.pop('__metadata__', None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError('safetensors whose __metadata__ is not names and strings')
    places = {name: _place(name, entry) for name, entry in header.items()}
    end, tree = 0, {}
    for name, (start, stop, dtype, shape) in sorted(places.items(), key=lambda item: item[1][:2]):
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or 8 + size + stop > len(data):
            raise ConversionError(
                f'safetensors in which {quote(name)}, {quote(shape)} of {dtype}, lies at {start} to {stop} '
                f'and its neighbour ends at {end}, of {len(data) - 8 - size} bytes: damaged or cut off'
            )
        tree[name], end = np.ndarray(shape, dtype, data, 8 + size + start), stop
    if 8 + size + end != len(data):
        raise ConversionError(f'safetensors with {len(data) - 8 - size} bytes of which the header names only {end}')
    return {name: tree[name] for name in places}, metadata


def _place(name: str, entry: Any) -> tuple[int, int, np.dtype[Any], tuple[int, ...]]:
    match entry:
        case {'dtype': str(kind), 'shape': [*shape], 'data_offsets': [start, stop]} if len(shape) <= 32 and all(
            type(n) is int and 0 <= n < 1 << 63 for n in (start, stop, *shape)
        ):
            if kind not in _SAFETENSORS:
                raise ConversionError(f'{quote(name)} is of {quote(kind)}, which numpy lacks: save it as F32 or BF16')
            return start, stop, DTYPES[f'torch.{_SAFETENSORS[kind]}'], tuple(shape)
    raise ConversionError(f'safetensors that say of {quote(name)}: {quote(entry)}')


def read_npz(data: Data, records: Mapping[str, Record]) -> dict[str, Any]:
    """Arrays by name; Foreign for those of strings and pickled objects, which are never read."""
    tree: dict[str, Any] = {}
    for name, content in unpacked(data, records).items():
        kind, order, shape, begin = _npy_header(name, content)
        tree[name.removesuffix('.npy')] = Foreign(f'numpy.ndarray of {kind}')
        if dtype := KINDS.get(kind[1:]):
            if begin + math.prod(shape) * dtype.itemsize != len(content):
                raise ConversionError(f'{quote(name)} of shape {shape} and {dtype} has {len(content)} bytes')
            dtype = dtype.newbyteorder('>') if kind[0] == '>' else dtype
            found = native(np.ndarray(shape, dtype, content, begin, order=order))
            found.flags.writeable = False
            tree[name.removesuffix('.npy')] = found
    return tree


def objects_in_npy(data: Data) -> int | None:
    """Where the pickle of an .npy file of objects begins; None for one of numbers."""
    kind, _, _, begin = _npy_header('the array', memoryview(data)[: HEADER_BYTES + 12])
    return begin if kind == '|O' else None


def _npy_header(name: str, content: memoryview) -> tuple[str, Any, tuple[int, ...], int]:
    """An array's kind ('<f4'), order ('C' or 'F') and shape, and where its numbers begin."""
    magic, version = struct.unpack_from('<6sB', content)
    (size,) = struct.unpack_from('<H' if version == 1 else '<L', content, 8)
    begin = (10 if version == 1 else 12) + size
    header = bytes(content[begin - min(size, HEADER_BYTES) : begin])
    facts = _NPY_HEADER.fullmatch(header)
    if magic != b'\x93NUMPY' or not facts:
        raise ConversionError(f'{quote(name)} is no array that numpy writes: {quote(header)}')
    kind, is_fortran, sizes = (fact.decode('latin1').strip("'") for fact in facts.groups())
    shape = tuple(int(n) for n in sizes.split(',') if n.strip())
    return kind, 'F' if is_fortran == 'True' else 'C', shape, begin


_NPY_HEADER = re.compile(
    rb"\{'descr': (.+), 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\}\s*"  # as numpy writes it
)
