"""What a pickle describes -> plain values and arrays: the few calls that make numbers are known, no other is looked up.

All sizes and offsets are the file's claims; each is checked against the file before it is used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.files.dtypes import DTYPES, native
from convert.files.pickle_reader import NESTING, Call, Data, Foreign, dtype_of, most_instructions, size_of
from convert.files.zip_directory import quote

EXPANDED = 1 << 20  # bytes: what an expanded tensor may claim in a file that is smaller than this


@dataclass(frozen=True, slots=True)
class Storage(Foreign):
    """The bytes that tensors are views of."""

    dtype: np.dtype[Any]
    data: Data
    start: int  # in the data
    size: int  # in bytes


_STORAGES = {'Double': 'float64', 'Float': 'float32', 'Half': 'float16', 'BFloat16': 'bfloat16', 'Bool': 'bool'}
_STORAGES |= {'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8'}
_STORAGES |= {'ComplexFloat': 'complex64', 'ComplexDouble': 'complex128'}
STORAGES = {f'torch.{name}Storage': DTYPES[f'torch.{dtype}'] for name, dtype in _STORAGES.items()}
STORAGES['torch.storage.UntypedStorage'] = np.dtype(np.uint8)


@dataclass(frozen=True)
class Storages:
    """The storages that a pickle of torch's points to."""

    data: Data
    places: Mapping[str, tuple[int, int]]  # by key, where each begins and its bytes

    def find(self, identity: Any) -> Foreign:
        """What a persistent identity stands for: ('storage', class, key, device, length), or that and None."""
        match identity:
            case ('storage', Foreign(kind), str(key), _, int(length), *views) if views in ([], [None]):
                dtype = STORAGES.get(kind)
                if dtype is None:
                    return Foreign(kind)  # quantized
                start, size = self.places.get(key, (0, -1))
                if not 0 <= length * dtype.itemsize <= size:
                    raise ConversionError(
                        f'its storage {quote(key)}, {length} numbers of {dtype}, is not there in full'
                    )
                return Storage(kind, dtype, self.data, start, length * dtype.itemsize)
        raise ConversionError(f'its pickle points to something that is no storage: {quote(identity)}')


Load = Callable[[bytes], Foreign]  # a file inside of the file -> the storage in it


def values(described: Any, size: int, storages: Storages, load: Load) -> Any:
    """The tree that a pickle describes.

    Args:
        described: What `read_pickle` gave.
        size: The bytes of the file.
        storages: Those that it points to.
        load: Gives the storage in a file inside of the file.

    Returns:
        dict, list, tuple, str, bytes, numbers, bool, None, arrays and Foreign.

    Raises: ConversionError; also when the tree holds itself, is too deep or repeats its parts so often that a walk
        would not end.
    """
    tree = _Values(size, storages, load).of(described, 0)
    _check_size(tree, size)
    return tree


class _Values:
    """Gives each value once, however often it is used, so that all takes time in proportion to the pickle."""

    def __init__(self, size: int, storages: Storages, load: Load) -> None:
        self.size, self.storages, self.load = size, storages, load
        self.bytes = 0  # of all tensors
        self.known: dict[Any, Any] = {}  # by what, and by the id of what is described, which is not freed meanwhile

    def of(self, described: Any, depth: int) -> Any:
        if not isinstance(described, dict | list | tuple | Call | bytearray | memoryview):
            return described
        if depth > NESTING:
            raise ConversionError(f'its values nest more than {NESTING} deep')
        return self.once('value', described, lambda: self.made(described, depth + 1))

    def once(self, what: Any, described: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives; for the same thing, the same again."""
        key = what, id(described)
        if key not in self.known:
            self.known[key] = _IN_PROGRESS
            self.known[key] = make()
        if self.known[key] is _IN_PROGRESS:
            raise ConversionError('a container in it contains itself')
        return self.known[key]

    def made(self, described: Any, depth: int) -> Any:
        match described:
            case dict():
                return {key: self.of(value, depth) for key, value in described.items()}
            case list():
                return [self.of(value, depth) for value in described]
            case tuple():
                return tuple([self.of(value, depth) for value in described])
            case bytearray():
                return Foreign('builtins.bytearray')
            case memoryview():
                return bytes(described)
        if described.numbers is not None:
            order = 'F' if described.state.get('order') == 'F' else 'C'
            return self.array(described.state['dtype'], described.state['shape'], order, described.numbers)
        return self.called(described, depth)

    def called(self, call: Call, depth: int) -> Any:
        """What a call would give, where that is a plain container, numbers, or what was set in it; else a Foreign."""
        match call.name.replace('numpy.core.', 'numpy._core.'), call.arguments:
            case 'persistent', identity:
                return self.storages.find(self.of(identity, depth))
            case (('collections.OrderedDict' | 'collections.defaultdict' | 'builtins.dict' | '__builtin__.dict'), _):
                return self.of(call.items, depth)
            case '_codecs.encode', (str(text), 'latin1'):
                return self.once('latin1', text, lambda: text.encode('latin1'))
            case (('builtins.bytes' | '__builtin__.bytes'), ()):
                return b''
            case 'torch.storage._load_from_bytes', (packed,) if isinstance(content := self.of(packed, depth), bytes):
                return self.once('storage', content, lambda: self.load(content))
            case 'numpy._core.multiarray.scalar', (described, raw):
                found = self.array(described, (), 'C', self.of(raw, depth))
                return found.item() if isinstance(found, np.ndarray) else found
            case 'numpy._core.numeric._frombuffer', (raw, described, shape, order) if not isinstance(raw, list):
                return self.array(described, shape, order, raw)
            case 'numpy._core.multiarray._reconstruct', arguments:
                match arguments, call.state:
                    case (Foreign('numpy.ndarray'), *_), (_, shape, described, is_fortran, raw):
                        return self.array(described, shape, 'F' if is_fortran else 'C', self.of(raw, depth))
                return Foreign('numpy.ndarray')
            case 'torch.Size', (tuple() as sizes,):
                return self.of(sizes, depth)
            case name, arguments if name.startswith('torch._'):
                return self.tensor(name, self.of(arguments, depth))
        return self.attributes(call, depth)

    def attributes(self, call: Call, depth: int) -> Any:
        """The items of a dict of the trainer's own, or else the attributes of an object, or else its parts."""
        held = call.items or (call.state[1] if isinstance(call.state, tuple) and len(call.state) == 2 else call.state)
        if not (isinstance(held, dict) and held):
            parts = call.arguments if call.makes_instance and isinstance(call.arguments, tuple) else ()
            held = parts if any(isinstance(part, dict | list | Call) for part in parts) else None  # a named tuple
        if not held or (isinstance(held, dict) and '_parameters' in held):  # a torch.nn.Module: its class is needed
            return Foreign(call.name)
        return self.of(held, depth)

    def array(self, described: Any, shape: Any, order: Any, raw: Any) -> Any:
        """An array that numpy pickled: its numbers, or the objects in it."""
        if isinstance(raw, list):
            return raw[0] if shape == () and len(raw) == 1 else raw
        dtype = dtype_of(described)
        if dtype is None or not isinstance(raw, bytes | bytearray | memoryview):
            kind = described.arguments[0] if isinstance(described, Call) and described.arguments else described
            return Foreign(f'numpy.ndarray of {quote(kind)}')
        if size_of(shape, dtype) != len(raw) or order not in ('C', 'F'):
            raise ConversionError(f'an array of shape {quote(shape)} and {dtype} has {len(raw)} bytes')
        return _for_reading(native(np.ndarray(shape, dtype, raw, order=order)))

    def tensor(self, name: str, arguments: Any) -> Any:
        """A view of the file; Foreign where a tensor is sparse, quantized, conjugated or without data."""
        match name.removeprefix('torch._utils.'), arguments:
            case '_rebuild_parameter' | '_rebuild_parameter_with_state', (value, *_):
                return value
            case '_rebuild_device_tensor_from_cpu_tensor', (np.ndarray() as value, Foreign(kind), *_):
                return value if DTYPES.get(kind) == value.dtype else Foreign('torch.Tensor')
            case '_rebuild_device_tensor_from_numpy', (np.ndarray() as value, Foreign(kind), *_) if kind in DTYPES:
                # bfloat16 was written as float32
                return self.once(kind, value, lambda: _for_reading(value.astype(DTYPES[kind], copy=False)))
            case 'torch._tensor._rebuild_from_type_v2', (Foreign(inner), Foreign(kind), tuple() as parts, _):
                plain = kind in ('torch.Tensor', 'torch.nn.parameter.Parameter')
                return self.tensor(inner, parts) if plain else Foreign(kind)
            case ('_rebuild_tensor', (Storage() as storage, offset, shape, strides)) | (
                '_rebuild_tensor_v2',
                (Storage() as storage, offset, shape, strides, _, _),
            ):
                return self.counted(view(storage, storage.dtype, offset, shape, strides, self.size))
            case '_rebuild_tensor_v3', (Storage() as storage, offset, shape, strides, _, _, Foreign(kind)) if (
                kind in DTYPES
            ):
                return self.counted(view(storage, DTYPES[kind], offset, shape, strides, self.size))
        return Foreign(name)

    def counted(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor, unless all so far repeat the file a hundredfold: some are tied, so many are an attack."""
        self.bytes += tensor.nbytes
        if self.bytes > 100 * self.size + EXPANDED:
            raise ConversionError(f'tensors that share {self.size} bytes of the file as {self.bytes} bytes of numbers')
        return tensor


_IN_PROGRESS = object()


def view(storage: Storage, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any, file_size: int) -> np.ndarray:
    """The numbers of a tensor where they lie in the file, once they are known to lie there."""
    alike = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 32
    if not alike or not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise ConversionError(f'a tensor of shape {quote(shape)}, strides {quote(strides)}, offset {quote(offset)}')
    if 0 in shape:
        return np.ndarray(shape, dtype, storage.data)
    steps = [stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if reach * dtype.itemsize > storage.size:
        raise ConversionError(f'a tensor of shape {shape} reaches beyond its storage of {storage.size} bytes')
    # An expanded tensor (stride 0) repeats numbers that the file has once; whoever copies it needs memory for all.
    if (size := math.prod(shape) * dtype.itemsize) > max(file_size, EXPANDED):
        raise ConversionError(f'a tensor of shape {shape}, expanded to {size} bytes from a file of {file_size}')
    start = storage.start + offset * dtype.itemsize
    return np.ndarray(shape, dtype, storage.data, start, tuple(step * dtype.itemsize for step in steps))


def _for_reading(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _check_size(tree: Any, size: int) -> None:
    """Refuses a tree whose parts are repeated so often that walking all of it takes too long.

    Some parts may be shared, a hundredfold is an attack.
    """
    most = min(100 * size, most_instructions(size))
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > most:
            raise ConversionError(f'its values are more than {most}, however often each is counted that is shared')
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
