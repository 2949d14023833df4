"""A pickle -> what it describes, and nothing done of it.

A pickle is a program. It is run here by an interpreter of our own that knows numbers, strings and containers. It
imports nothing and calls nothing: a class is only its name, and a call only a note of it. `pickled_values.py` says what
the few calls that matter would give. Every instruction takes time and memory in proportion to its own length.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.files.dtypes import KINDS
from convert.files.zip_directory import quote

NESTING = 100  # the greatest depth of what a pickle describes
INSTRUCTIONS = 1_000_000  # how many a pickle may always have ...
BYTES_PER_INSTRUCTION = 8  # ... and one more for as many bytes of its file; PyTorch takes some 40 a tensor
NAME = 1000  # the most characters in the name of a class

Data = mmap | bytes  # a mapped file, or what was packed in one


@dataclass(frozen=True, slots=True)
class Foreign:
    """Stands where the file had an object of a class that we neither import nor call."""

    name: str  # 'argparse.Namespace'


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """What the pickle would have called, and what it would then have done to the result."""

    name: str  # of the class or function
    arguments: Any
    makes_instance: bool  # it is a class, of which `arguments` are those of __new__
    items: dict[Any, Any] = field(default_factory=dict)  # that were set in it, as in a dict
    state: Any = None  # that __setstate__ would have had, mostly the attributes
    numbers: memoryview | None = None  # the bytes that joblib writes behind an array's description


class _Stream:
    """The part of a file that is read, for pickletools. Arrays' bytes are views of it."""

    def __init__(self, data: Data, start: int, end: int) -> None:
        self.data, self.view, self.at, self.end = data, memoryview(data), start, end
        self.byte = b''  # the last that was read alone

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> Any:
        start, self.at = self.at, min(self.at + size, self.end)
        if size == 1:
            self.byte = self.data[start : self.at]
            return self.byte
        is_long = self.byte in (b'B', b'\x8e') and size > 8  # BINBYTES, BINBYTES8; behind them, their 4 or 8 of length
        return (self.view if is_long else self.data)[start : self.at]

    def readline(self) -> bytes:
        start, stop = self.at, self.data.find(b'\n', self.at, self.end)
        self.at = self.end if stop < 0 else stop + 1
        return self.data[start : self.at]


def most_instructions(size: int) -> int:
    """The most that a pickle in a file of so many bytes may have, and the most values in the tree that it makes."""
    return INSTRUCTIONS + size // BYTES_PER_INSTRUCTION


def read_pickle(data: Data, start: int = 0, end: int | None = None) -> tuple[Any, int, list[Any]]:
    """What a pickle in data[start:end] describes, out of dicts, lists, tuples, plain values, Foreign and Call.

    Returns it, where the pickle ends, and the persistent identities in it, each of them a Call of 'persistent'.

    Raises: ConversionError, ValueError, LookupError, OverflowError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # of strings that escape what needs no escape
        return _described(_Stream(data, start, len(data) if end is None else end), most_instructions(len(data)))


def _described(stream: _Stream, most: int) -> tuple[Any, int, list[Any]]:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks that MARK has set aside
    memo: dict[int, Any] = {}
    identities: list[Any] = []
    argument: Any
    items: list[Any] = []
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if step == most:
            raise ConversionError(
                f'its pickle has more than {most} instructions, too many for its {len(stream.data)} bytes'
            )
        name = opcode.name
        if name in _TAKES:
            if (count := _TAKES[name]) is None:
                items, stack = stack, outer.pop()
            elif len(stack) < count:
                raise ConversionError('its pickle takes more values than it made')
            else:
                items = stack[-count:]
                del stack[-count:]
        match name:
            case 'PROTO' | 'FRAME':
                pass
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
                if not isinstance(items[0], Foreign | Call):
                    raise ConversionError(f'its pickle calls {quote(items[0])}, which is no class or function')
                stack.append(Call(items[0].name, items[1], name != 'REDUCE'))
            case 'BUILD':
                if isinstance(stack[-1], Call):
                    stack[-1].state = items[0]
                    if stack[-1].name == _ARRAY_FOLLOWS:
                        stack[-1].numbers = _numbers_behind(stream, items[0])
            case 'BINPERSID':
                match items[0]:
                    case ('module', Foreign() as module_class, *_):  # the class of a whole module, in the older format
                        stack.append(module_class)
                    case identity:
                        stack.append(Call('persistent', identity, False))
                        identities.append(identity)
            case 'STOP':
                return items[0], stream.at, identities
            case 'LONG4':
                stack.append(Foreign('builtins.int'))  # of thousands of digits
            case _ if name in _LITERALS:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _:
                raise ConversionError(f'its pickle has the instruction {name}, which is not read')
    raise ConversionError('its pickle has no end')


# What an instruction pushes, for those that only push; and how many values another takes first, None for "to the mark".
_LITERALS = {'BINFLOAT', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'}
_LITERALS |= {'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8', 'BINSTRING', 'SHORT_BINSTRING'}
_CONSTANTS: dict[str, Any] = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_CONSTANTS |= {'EMPTY_SET': Foreign('builtins.set')}
_TAKES = dict.fromkeys(('TUPLE', 'FROZENSET', 'SETITEMS', 'APPENDS', 'ADDITEMS'))
_TAKES |= {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'SETITEM': 2, 'APPEND': 1, 'BUILD': 1, 'BINPERSID': 1, 'STOP': 1}
_TAKES |= {'STACK_GLOBAL': 2, 'REDUCE': 2, 'NEWOBJ': 2, 'NEWOBJ_EX': 3}

_ARRAY_FOLLOWS = 'joblib.numpy_pickle.NumpyArrayWrapper'


def _numbers_behind(stream: _Stream, state: Any) -> memoryview:
    """What joblib writes behind the description of an array, in the midst of the pickle.

    A byte says how many it left out, so that the numbers are aligned.
    """
    match state:
        case {'shape': tuple() as shape, 'dtype': Call() as described} if dtype := dtype_of(described):
            size = size_of(shape, dtype)
            if 'numpy_array_alignment_bytes' in state:
                stream.at += 1 + int.from_bytes(stream.data[stream.at : stream.at + 1], 'little')
            if stream.at + size <= stream.end:
                stream.at += size
                return stream.view[stream.at - size : stream.at]
    raise ConversionError('an array that joblib wrote of objects, or not to the end')


def dtype_of(described: Any) -> np.dtype[Any] | None:
    """The dtype that a Call describes, if it is one of plain numbers."""
    match described:
        case Call('numpy.dtype', (str(kind) | Foreign(kind), *_)):
            dtype = KINDS.get(kind)
            big = isinstance(described.state, tuple) and described.state[1:2] == ('>',)
            return dtype.newbyteorder('>') if dtype is not None and big else dtype
    return None


def size_of(shape: Any, dtype: np.dtype[Any]) -> int:
    """The bytes of an array. Raises ConversionError when the shape is none."""
    if not (isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)):
        raise ConversionError(f'an array of shape {quote(shape)}')
    return math.prod(shape) * dtype.itemsize


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Foreign | Call):
        raise ConversionError('its pickle appends to something that is not a list')


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, Call):
        target = target.items
    if isinstance(target, dict) and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if _plain(key) else Foreign(f'key {len(target)}')] = value
    elif not isinstance(target, Foreign):
        raise ConversionError('its pickle sets items of something that is not a dict')


def _plain(key: Any) -> bool:
    """Whether a dict can take the key quickly.

    The hash of a nested tuple may take for ever, as may large integers, and thousands of tuples can be made that have
    the same; of strings nobody can, and of numbers too few.
    """
    return key.bit_length() <= 64 if isinstance(key, int) else isinstance(key, str | bytes | float | None)


def _global(module: Any, name: Any) -> Foreign:
    if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= NAME):
        raise ConversionError(f'its pickle names a class {quote(module)}.{quote(name)}')
    return Foreign(f'{module}.{name}')
