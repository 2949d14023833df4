"""A torch zip archive (torch 1.6 and later) -> plain containers and arrays that are views of the mapped file.

The archive's `data.pkl` is a pickle, and a pickle is a program. It is run here by an interpreter of our own that knows
numbers, strings and containers. It imports nothing and calls nothing: a class is only its name, and so is its instance.
All sizes and offsets are the file's claims; each is checked against the file before it is used.
"""

import math
import pickletools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConversionError
from convert.files.zip_directory import Record, quote

PICKLE_BYTES = 32 << 20  # the largest data.pkl that is read
PICKLE_STEPS = 300_000  # its most instructions, and the most values in the tree it makes
NESTING = 100  # the greatest depth of that tree
NAME = 1000  # the most characters in the name of a class
EXPANDED = 1 << 20  # bytes: what an expanded tensor may claim in a file that is smaller than this


@dataclass(frozen=True, slots=True)
class Foreign:
    """Stands where the file had an object of a class that we neither import nor call."""

    name: str  # 'argparse.Namespace'


@dataclass(frozen=True, slots=True)
class _Storage(Foreign):
    """The bytes that tensors are views of."""

    dtype: np.dtype[Any]
    start: int  # in the file
    size: int  # in bytes


_NUMPY = 'float64 float32 float16 complex64 complex128 bool uint8 uint16 uint32 uint64 int8 int16 int32 int64'
_BEYOND_NUMPY = 'bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu'
DTYPES: dict[str, np.dtype[Any]] = {f'torch.{name}': np.dtype(name) for name in _NUMPY.split()}
DTYPES |= {f'torch.{name}': np.dtype(getattr(ml_dtypes, name)) for name in _BEYOND_NUMPY.split()}

_STORAGES = {'Double': 'float64', 'Float': 'float32', 'Half': 'float16', 'BFloat16': 'bfloat16', 'Bool': 'bool'}
_STORAGES |= {'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8'}
_STORAGES |= {'ComplexFloat': 'complex64', 'ComplexDouble': 'complex128'}
STORAGES = {f'torch.{name}Storage': DTYPES[f'torch.{dtype}'] for name, dtype in _STORAGES.items()}
STORAGES['torch.storage.UntypedStorage'] = np.dtype(np.uint8)


_WEIGHTS_ALONE = "Save the weights alone: torch.save(model.state_dict(), 'weights.pt')"


def read_torch_zip(data: mmap, records: Mapping[str, Record]) -> Any:
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
        raise ConversionError('saved on a big-endian machine: load it with torch and save it again on a little-endian')
    program = records[pickles[0]]
    if program.size > PICKLE_BYTES:
        raise ConversionError(f'its data.pkl has {program.size} bytes, the limit is {PICKLE_BYTES}. {_WEIGHTS_ALONE}')
    code = data[program.start : program.start + program.size]
    if program.checksum not in (0, zlib.crc32(code)):  # torch writes 0 where it is told to compute none
        raise ConversionError('a damaged file: the checksum of its data.pkl is wrong. Copy or download it again')
    tree = _Interpreter(data, {name.removeprefix(folder): record for name, record in records.items()}).run(code)
    check_size(tree, len(code))
    return tree


def check_size(tree: Any, source_size: int) -> None:
    """Refuses a tree that holds itself, is too deep, or repeats its parts so often that a walk would not end.

    `source_size`: the bytes that the tree was read from. Some parts may be shared, a hundredfold is an attack.
    """
    most = min(PICKLE_STEPS, 100 * source_size)
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > NESTING or count > most:
            raise ConversionError(f'its values nest more than {NESTING} deep, or are more than {most}')
        if isinstance(value, dict):
            waiting.extend((part, depth + 1) for part in value.values())
        elif isinstance(value, list | tuple):
            waiting.extend((part, depth + 1) for part in value)


def check_expanded(shape: tuple[int, ...], size: int, file_size: int) -> None:
    """Refuses a tensor of more bytes than its file.

    An expanded tensor (stride 0) repeats numbers that the file has once; whoever copies it needs memory for all.
    """
    if size > max(file_size, EXPANDED):
        raise ConversionError(f'a tensor of shape {shape}, expanded to {size} bytes from a file of {file_size}')


# What an instruction pushes, for those that only push; and how many values another takes first, None for "to the mark".
_LITERALS = {'BINFLOAT', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'}
_LITERALS |= {'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BINSTRING', 'SHORT_BINSTRING'}
_CONSTANTS: dict[str, Any] = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_CONSTANTS |= {'EMPTY_SET': Foreign('builtins.set'), 'BYTEARRAY8': Foreign('builtins.bytearray')}
_TAKES = dict.fromkeys(('TUPLE', 'FROZENSET', 'SETITEMS', 'APPENDS', 'ADDITEMS'))
_TAKES |= {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'SETITEM': 2, 'APPEND': 1, 'BUILD': 1, 'BINPERSID': 1, 'STOP': 1}
_TAKES |= {'STACK_GLOBAL': 2, 'REDUCE': 2, 'NEWOBJ': 2, 'NEWOBJ_EX': 3}


class _Interpreter:
    """Runs a pickle: each instruction takes time and memory in proportion to its own length, and no other effect."""

    def __init__(self, data: mmap, records: Mapping[str, Record]) -> None:
        self.data, self.records = data, records

    def run(self, program: bytes) -> Any:
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks that MARK has set aside
        memo: dict[int, Any] = {}
        argument: Any
        items: list[Any] = []
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if step == PICKLE_STEPS:
                raise ConversionError(f'its data.pkl has more than {PICKLE_STEPS} instructions. {_WEIGHTS_ALONE}')
            name = opcode.name
            if name in _TAKES:
                if (count := _TAKES[name]) is None:
                    items, stack = stack, outer.pop()
                elif len(stack) < count:
                    raise ConversionError('its data.pkl takes more values than it made')
                else:
                    items = stack[-count:]
                    del stack[-count:]
            match name:
                case 'PROTO' | 'FRAME':
                    pass
                case 'BUILD':  # sets an object's attributes, which are all that a Namespace is: a trainer's arguments
                    match stack[-1], items[0]:
                        case Foreign('argparse.Namespace'), dict() as attributes:
                            stack[-1] = attributes
                case 'MARK':
                    if len(outer) > 3 * NESTING:  # a container, its class and its arguments have each their own
                        raise ConversionError(f'its values nest more than {NESTING} deep')
                    outer.append(stack)
                    stack = []
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[argument] = stack[-1]
                case 'MEMOIZE':
                    memo[len(memo)] = stack[-1]
                case 'BINGET' | 'LONG_BINGET':
                    stack.append(memo[argument])
                case 'EMPTY_DICT':
                    stack.append({})
                case 'EMPTY_LIST':
                    stack.append([])
                case 'SETITEM' | 'SETITEMS':
                    _set_items(stack[-1], items)
                case 'APPEND' | 'APPENDS' | 'ADDITEMS':
                    _append(stack[-1], items)
                case 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    stack.append(tuple(items))
                case 'FROZENSET':
                    stack.append(Foreign('builtins.frozenset'))
                case 'GLOBAL':
                    stack.append(_global(*argument.split(' ', 1)))
                case 'STACK_GLOBAL':
                    stack.append(_global(*items))
                case 'REDUCE' | 'NEWOBJ' | 'NEWOBJ_EX':
                    stack.append(self.call(*items))
                case 'BINPERSID':
                    stack.append(self.storage(*items))
                case 'STOP':
                    return items[0]
                case _ if name in _LITERALS:
                    stack.append(argument)
                case _ if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case _:
                    raise ConversionError(f'its data.pkl has the instruction {name}, which torch.save does not write')
        raise ConversionError('its data.pkl has no end')

    def call(self, function: Any, arguments: Any, _keywords: Any = None) -> Any:
        """What a call would make, where that is a plain container or tensor; else a Foreign of the same name."""
        match function, arguments:
            case Foreign('collections.OrderedDict' | 'builtins.dict' | '__builtin__.dict'), ():
                return {}
            case Foreign('collections.defaultdict'), (_,):
                return {}
            case Foreign('torch.Size'), (tuple() as sizes,):
                return sizes
            case Foreign('torch._utils._rebuild_parameter' | 'torch._utils._rebuild_parameter_with_state'), (value, *_):
                return value
            case Foreign('torch._utils._rebuild_device_tensor_from_cpu_tensor'), (
                np.ndarray() as value,
                Foreign(kind),
                *_,
            ):
                return value if DTYPES.get(kind) == value.dtype else Foreign('torch.Tensor')
            case Foreign('torch._tensor._rebuild_from_type_v2'), (
                Foreign() as rebuild,
                Foreign(kind),
                tuple() as inner,
                _,
            ):
                plain = kind in ('torch.Tensor', 'torch.nn.parameter.Parameter')
                return self.tensor(rebuild, inner) if plain else Foreign(kind)
            case Foreign(), _:
                return self.tensor(function, arguments)
        raise ConversionError(f'its data.pkl calls {quote(function)}, which is no class or function')

    def storage(self, identity: Any) -> Foreign:
        """The bytes named by a persistent identity: ('storage', class, key, device, length)."""
        match identity:
            case ('storage', Foreign(kind), str(key), _, int(length), *_):
                dtype, record = STORAGES.get(kind), self.records.get(f'data/{key}')
                if dtype is None:
                    return Foreign(kind)  # quantized
                if record is None or not 0 <= length * dtype.itemsize <= record.size:
                    raise ConversionError(
                        f'its storage {quote(key)}, {length} numbers of {dtype}, is not there in full'
                    )
                return _Storage(kind, dtype, record.start, length * dtype.itemsize)
        raise ConversionError(f'its data.pkl points to something that is no storage: {quote(identity)}')

    def tensor(self, rebuild: Foreign, arguments: Any) -> Any:
        """A read-only view of the file; Foreign where a tensor is sparse, quantized, conjugated or without data."""
        match rebuild.name.removeprefix('torch._utils.'), arguments:
            case ('_rebuild_tensor', (_Storage() as storage, offset, shape, strides)) | (
                '_rebuild_tensor_v2',
                (_Storage() as storage, offset, shape, strides, _, _),
            ):
                dtype = storage.dtype
            case '_rebuild_tensor_v3', (_Storage() as storage, offset, shape, strides, _, _, Foreign(kind)) if (
                kind in DTYPES
            ):
                dtype = DTYPES[kind]
            case _:
                return Foreign(rebuild.name)
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise ConversionError(f'a tensor of shape {quote(shape)} with strides {quote(strides)}')
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides)) or len(shape) > 32:
            raise ConversionError(f'a tensor of shape {quote(shape)}, strides {quote(strides)}, offset {quote(offset)}')
        if 0 in shape:
            return np.ndarray(shape, dtype, self.data)
        steps = [stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if reach * dtype.itemsize > storage.size:
            raise ConversionError(f'a tensor of shape {shape} reaches beyond its storage of {storage.size} bytes')
        check_expanded(shape, math.prod(shape) * dtype.itemsize, len(self.data))
        start = storage.start + offset * dtype.itemsize
        return np.ndarray(shape, dtype, self.data, start, tuple(step * dtype.itemsize for step in steps))


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Foreign):
        raise ConversionError('its data.pkl appends to what is no list')


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict) and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if _plain(key) else Foreign(f'key {len(target)}')] = value
    elif not isinstance(target, Foreign):
        raise ConversionError('its data.pkl sets items of what is no dict')


def _plain(key: Any) -> bool:
    """Whether a dict can take the key quickly: the hash of a nested tuple may take for ever, as may large integers."""
    parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    return all(
        part.bit_length() <= 64 if isinstance(part, int) else isinstance(part, str | bytes | float | None)
        for part in parts
    )


def _global(module: Any, name: Any) -> Foreign:
    if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= NAME):
        raise ConversionError(f'its data.pkl names a class {quote(module)}.{quote(name)}')
    return Foreign(f'{module}.{name}')
