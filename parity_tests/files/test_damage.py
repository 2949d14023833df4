"""No file, however damaged or hostile, does more than give its arrays or a ConversionError, in few steps and bytes.

FUZZ_FILES=100000 reads that many damaged files, in place of 180.
"""

import io
import json
import os
import pickle
import pickletools
import random
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from convert.errors import ConversionError
from convert.files import pickle_reader, zip_directory as zip_file
from convert.files.checkpoint import read
from convert.files.pickle_reader import Foreign
from parity_tests.support.fuzz import Executed, archive, attempt, damaged_files, safetensors_file

FILES = int(os.environ.get('FUZZ_FILES', '180'))
GROUPS = 3  # of files, each a test of its own, so that they run side by side

# Hypothesis' files replace each other in one folder; each is written before it is read.
write_over = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.mark.slow
@pytest.mark.parametrize('group', range(GROUPS))
def test_damaged_files(tmp_path: Path, group: int) -> None:
    path = tmp_path / 'damaged'
    for _, data in damaged_files(seed=group, count=FILES // GROUPS):
        path.write_bytes(data)
        attempt(path)
    assert list(tmp_path.iterdir()) == [path]


def harmless(path: Path, data: bytes) -> Any:
    """Reads the bytes as a file: the tree, or None where it is refused."""
    path.write_bytes(data)
    outcome, _, _ = attempt(path, compare=False)
    return read(path).tree if outcome == 'converted' else None


# ---- pickles

EXABYTE = 2**60


def pickled(*parts: Any) -> bytes:
    """A pickle: bytes are instructions, other values are pushed."""
    pushed = (p if isinstance(p, bytes) else pickletools.optimize(pickle.dumps(p, 2))[2:-1] for p in parts)
    return b'\x80\x02' + b''.join(pushed) + b'.'


def tensor_program(storage: Any, offset: Any, shape: Any, strides: Any) -> bytes:
    """The pickle of one tensor, `storage` being (key, length) of float32."""
    key, length = storage
    return pickled(
        *(
            b'ctorch._utils\n_rebuild_tensor_v2\n(',
            b'(',
            'storage',
            b'ctorch\nFloatStorage\n',
            key,
            'cpu',
            length,
            b'tQ',
        ),
        *(offset, shape, strides, False, None, b'tR'),
    )


HOSTILE_PROGRAMS = {
    'memo far away': pickled(None, b'r\xff\xff\xff\xff'),
    'memo not there': pickled(b'j\xff\xff\xff\xff'),
    'string of an exabyte': pickled(struct.pack('<cQ', b'\x8d', EXABYTE)),
    'bytes of an exabyte': pickled(struct.pack('<cQ', b'\x8e', EXABYTE)),
    'bytearray of an exabyte': pickled(struct.pack('<cQ', b'\x96', EXABYTE)),
    'frame of an exabyte': pickled(struct.pack('<cQ', b'\x95', EXABYTE)),
    'number of 2 GB': pickled(struct.pack('<cL', b'\x8b', 2**31 - 1)),
    'list in itself': pickled(b']q\0h\0a'),
    'dict in itself': pickled(b'}q\0', 'a', b'h\0s'),
    'deep list': pickled(b']' * 20_000 + b'a' * 19_999),
    'deep tuple': pickled(b')' + b'\x85' * 50_000),
    'deep tuple as a key': pickled(b'})' + b'\x85' * 50_000, 1, b's'),
    'deep tuple as a class': pickled(b')' + b'\x85' * 50_000 + b')R'),
    'deep tuple as a storage': pickled(b')' + b'\x85' * 50_000 + b'Q'),
    'a billion laughs': pickled(b')' + b'q\0h\0h\0\x87' * 90),
    'a billion laughs as a key': pickled(b'})' + b'q\0h\0h\0\x87' * 90, 1, b's'),
    'a billion laughs as a class': pickled(b'cos\nsystem\n)' + b'q\0h\0h\0\x87' * 90 + b'R\x85)R'),
    'a billion laughs as a storage': pickled(b'cos\nsystem\n)' + b'q\0h\0h\0\x87' * 90 + b'RQ'),
    'half a million marks': pickled(b'(' * 500_000, 5),
    'nothing to take': pickled(b'R'),
    'no end': pickled(b'}')[:-1],
    'a number called': pickled(1, b')R'),
    'items of a number': pickled(1, 'a', 'b', b's'),
    'an odd dict': pickled(b'}(', 'a', b'u'),
    'a storage of another pickle': pickled(b'ctorch.storage\n_load_from_bytes\n', b'}\x85R'),
    'an array longer than its bytes': pickled(
        *(b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n', (0,), 'b', b'\x87R(', 1, (10**9,)),
        *(b'cnumpy\ndtype\n', ('f4', False, True), b'R', False, b'B\4\0\0\0abcd', b'tb'),
    ),
    'an array of negative size': pickled(
        *(b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n', (0,), 'b', b'\x87R(', 1, (-1, -1)),
        *(b'cnumpy\ndtype\n', ('f4', False, True), b'R', False, b'B\4\0\0\0abcd', b'tb'),
    ),
    'an array that joblib did not write': pickled(
        *(b'cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(', 'shape', (10**9,), 'dtype'),
        *(b'cnumpy\ndtype\n', ('f4', False, True), b'Rub'),
    ),
    'an extension': pickled(b'\x82\1'),
    'protocol 0': b'(dp0\n.',
    'a buffer': pickled(b'\x97'),
    'an outside object': pickled('something', b'Q'),
    'half a surrogate': pickled(b'X\3\0\0\0\xed\xa0\x80'),
    'negative stride': tensor_program(('0', 4), 3, (4,), (-1,)),
    'negative offset': tensor_program(('0', 4), -1, (1,), (1,)),
    'negative length': tensor_program(('0', -4), 0, (1,), (1,)),
    'negative size': tensor_program(('0', 4), 0, (-1,), (1,)),
    'a size too large': tensor_program(('0', 4), 0, (5,), (1,)),
    'a stride too large': tensor_program(('0', 4), 0, (2, 2), (3, 1)),
    'an offset too large': tensor_program(('0', 4), 4, (1,), (1,)),
    'sizes that overflow': tensor_program(('0', 4), 0, (2**32, 2**32), (2**32, 2**32)),
    'a size beyond 64 bits': tensor_program(('0', 4), 0, (2**64, 0), (0, 0)),
    'an empty exabyte': tensor_program(('0', 4), 0, (0, 2**62), (0, 0)),
    'a terabyte by expanding': tensor_program(('0', 4), 0, (10**12,), (0,)),
    'fractions': tensor_program(('0', 4), 0, (1.0,), (1,)),
    'shape and strides unlike': tensor_program(('0', 4), 0, (1, 1), (1,)),
    '33 dimensions': tensor_program(('0', 4), 0, (1,) * 33, (1,) * 33),
    'a list for a shape': tensor_program(('0', 4), 0, [4], [1]),
    'a storage too long': tensor_program(('0', 5), 0, (1,), (1,)),
    'a storage of 2**70': tensor_program(('0', 2**70), 0, (1,), (1,)),
    'a storage not there': tensor_program(('1', 4), 0, (1,), (1,)),
    'a storage outside': tensor_program(('../../etc/passwd\x1b', 4), 0, (1,), (1,)),
}


@pytest.mark.parametrize('name', HOSTILE_PROGRAMS)
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    found = harmless(tmp_path / 'x.pt', archive(HOSTILE_PROGRAMS[name], {'0': bytes(16)}))
    allowed = {'memo far away': None, 'an empty exabyte': None, 'half a surrogate': '\ud800'}
    # A key that is no plain value is passed over, with what hides in it.
    passed = {'deep tuple as a key': {Foreign('key 0'): 1}, 'a billion laughs as a key': {Foreign('key 0'): 1}}
    assert found == (allowed | passed).get(name)


def test_the_sound_twin_of_the_hostile_tensors(tmp_path: Path) -> None:
    data = archive(tensor_program(('0', 4), 0, (2, 2), (2, 1)), {'0': np.arange(4, dtype=np.float32).tobytes()})
    assert harmless(tmp_path / 'x.pt', data).tolist() == [[0, 1], [2, 3]]
    wide = tensor_program(('0', 4), 0, (1, 4), (2**62, 1))  # the stride of a single element may be anything
    assert harmless(tmp_path / 'x.pt', archive(wide, {'0': bytes(16)})).shape == (1, 4)


@pytest.mark.parametrize('function', ['os.system', 'builtins.exec', 'builtins.eval', 'posix.system', 'pty.spawn'])
@pytest.mark.parametrize('form', ['REDUCE', 'NEWOBJ', 'NEWOBJ_EX', 'STACK_GLOBAL', 'BUILD'])
def test_calls_are_not_made(tmp_path: Path, function: str, form: str) -> None:
    module, name = function.split('.')
    marker = tmp_path / 'executed'
    code = f'touch {marker}' if 'system' in function else f"open({str(marker)!r}, 'w')"
    called = f'c{module}\n{name}\n'.encode()
    program = {
        'REDUCE': pickled(b'}', 'a', called, code, b'\x85Rs'),
        'NEWOBJ': pickled(b'}', 'a', called, code, b'\x85\x81s'),
        'NEWOBJ_EX': pickled(b'}', 'a', called, code, b'\x85}\x92s'),
        'STACK_GLOBAL': pickled(b'}', 'a', module, name, b'\x93', code, b'\x85Rs'),
        'BUILD': pickled(b'}', 'a', called, {'__setstate__': code, '__class__': code}, b'bs'),
    }[form]
    assert harmless(tmp_path / 'x.pt', archive(program, {})) == {'a': Foreign(function)}
    assert not marker.exists()


def test_no_class_is_looked_up(tmp_path: Path) -> None:
    torch.save({'a': Executed(tmp_path / 'executed')}, tmp_path / 'x.pt')
    read(tmp_path / 'x.pt')  # what reading itself imports is imported
    modules = set(sys.modules)
    data = archive(pickled(b'}', 'a', b'cantigravity\nfly\n)Rs'), {})
    assert harmless(tmp_path / 'x.pt', data) == {'a': Foreign('antigravity.fly')}
    assert set(sys.modules) == modules
    assert not (tmp_path / 'executed').exists()


def test_the_work_is_in_proportion_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More instructions than a file of the size has are refused, and more values by their being shared."""
    monkeypatch.setattr(pickle_reader, 'INSTRUCTIONS', 1000)
    monkeypatch.setattr(pickle_reader, 'BYTES_PER_INSTRUCTION', 1000)
    assert harmless(tmp_path / 'x.pt', archive(pickled([0] * 990), {})) == [0] * 990
    assert harmless(tmp_path / 'x.pt', archive(pickled([0] * 1000), {})) is None
    assert harmless(tmp_path / 'x.pt', archive(pickled([0] * 1000), {'0': bytes(30_000)})) == [0] * 1000
    assert harmless(tmp_path / 'x.pt', archive(pickled(5, b'q\0' * 990), {})) == 5
    assert harmless(tmp_path / 'x.pt', archive(pickled(5, b'q\0' * 1010), {})) is None
    shared = pickled(b']q\0(', *[0] * 40, b'e](' + b'h\0' * 40 + b'e')  # 41 + 40 x 41 values from 120 instructions
    assert harmless(tmp_path / 'x.pt', archive(shared, {})) is None


def colliding_tuples(count: int) -> list[tuple[int, int]]:
    """Pairs of integers that have one hash: tuples' is not keyed, and every step of it can be undone."""
    mask, one, two, five = 2**64 - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261

    def turned(number: int) -> int:
        return ((number << 31) | (number >> 33)) & mask

    def after(accumulated: int, lane: int) -> int:
        return turned((accumulated + lane * two) & mask) * one & mask

    target, found = 12345678901234567, []
    for first in range(100 * count):
        # the second number after which the hash is `target`
        wanted = target * pow(one, -1, 2**64) & mask
        before = ((wanted >> 31) | (wanted << 33)) & mask
        second = (before - after(five, first)) * pow(two, -1, 2**64) & mask
        if second < 2**61 - 1:
            found.append((first, second))
    return found[:count]


@pytest.mark.skipif(sys.hash_info.width != 64, reason='the hash of a tuple is computed in 64 bits')
def test_keys_that_collide(tmp_path: Path) -> None:
    keys = colliding_tuples(200)
    assert len(keys) == 200
    assert len({hash(key) for key in keys}) == 1
    path = tmp_path / 'x.pt'
    torch.save(dict.fromkeys(keys, 1), path)
    tree = read(path).tree
    assert set(tree.values()) == {1}
    assert len({hash(key) for key in tree}) == 200


def test_the_same_bytes_are_unpacked_once(tmp_path: Path) -> None:
    """However often a pickle calls for the same: each of these calls would cost as much as the file is long."""
    file = io.BytesIO()
    torch.save(torch.ones(1000).untyped_storage(), file, _use_new_zipfile_serialization=False)
    text = 'a' * 5000
    load, encode = b'ctorch.storage\n_load_from_bytes\n', b'c_codecs\nencode\n'
    content = b'B' + struct.pack('<L', len(file.getvalue())) + file.getvalue()
    program = pickled(b'](', load, b'q\1', content, b'\x85q\0R', b'h\1h\0R' * 500, b'e')
    storages = harmless(tmp_path / 'x.pt', archive(program, {}))
    assert len(storages) == 501
    assert all(found is storages[0] for found in storages)
    program = pickled(b'](', encode, b'q\1', text, 'latin1', b'\x86q\0R', b'h\1h\0R' * 500, b'e')
    encoded = harmless(tmp_path / 'x.pt', archive(program, {}))
    assert len(encoded) == 501
    assert all(found is encoded[0] for found in encoded)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-(2**63), 2**63), inner, max_size=4)
    ),
    max_leaves=20,
)


@write_over
@given(tree=plain_values, protocol=st.sampled_from([3, 4, 5]))
def test_every_plain_value_is_read_as_it_is(tmp_path: Path, tree: Any, protocol: int) -> None:
    torch.save(tree, tmp_path / 'x.pt', pickle_protocol=protocol)
    assert read(tmp_path / 'x.pt').tree == tree


@write_over
@given(data=st.data())
def test_every_view_is_read_or_refused_as_numpy_would(tmp_path: Path, data: st.DataObject) -> None:
    """Against an oracle that knows no arithmetic: the set of elements that a view touches."""
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    strides = tuple(data.draw(st.integers(0, 9)) for _ in shape)
    offset, length = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 20))
    numbers = np.arange(length, dtype=np.float32)
    touched = [offset + int(np.dot(index, strides)) for index in np.ndindex(shape)]
    program = tensor_program(('0', length), offset, shape, strides)
    found = harmless(tmp_path / 'x.pt', archive(program, {'0': numbers.tobytes()}))
    if all(place < length for place in touched):
        assert found.shape == shape
        assert found.flatten().tolist() == touched
    else:
        assert found is None


# ---- zip archives


def sound_archive() -> bytearray:
    program = tensor_program(('0', 4), 0, (4,), (1,))
    return bytearray(archive(program, {'0': np.arange(4, dtype=np.float32).tobytes()}))


def entry(data: bytes | bytearray, number: int) -> int:
    """Where the directory's entry of a number begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b'PK\1\2', at + 1)
    return at


def test_directories_that_lie(tmp_path: Path) -> None:
    path, sound = tmp_path / 'x.pt', bytes(sound_archive())
    assert harmless(path, sound).tolist() == [0, 1, 2, 3]
    assert harmless(path, sound + b'a comment' * 3).tolist() == [0, 1, 2, 3]
    end, version, last = sound.rindex(b'PK\5\6'), entry(sound, 2), entry(sound, 3)
    lies: dict[str, list[tuple[int, int]]] = {
        'place of a file': [(last + 42, 2**31)],
        'size of a file': [(last + 20, 2**31), (last + 24, 2**31)],
        'a file that reaches into its neighbour': [(version + 20, 20), (version + 24, 20)],
        'packed and unpacked sizes': [(version + 20, 1)],
        'a name': [(version + 46 + 8, 0x58585858)],
        'the place of another': [(last + 42, 0)],
        'a rare compression': [(version + 10, 12)],
        'count': [(end + 10, 0xFFF0)],
        'size of the directory': [(end + 12, 2**30)],
        'place of the directory': [(end + 16, 2**30)],
        'sixty-four bits': [(end + 16, 2**32 - 1)],
        'a secret': [(version + 8, 1)],
    }
    for lie, changes in lies.items():
        hostile = bytearray(sound)
        for place, number in changes:
            width = 2 if place in (version + 8, version + 10) else 4
            hostile[place : place + width] = number.to_bytes(width, 'little')
        assert harmless(path, bytes(hostile)) is None, lie


def test_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_file, 'RECORDS', 3)
    assert harmless(tmp_path / 'x.pt', bytes(sound_archive())) is None


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / 'x.pt'
    path.write_bytes(sound_archive())
    with zipfile.ZipFile(path, 'a') as file:
        file.writestr('archive/data/0', bytes(16))
    with pytest.raises(ConversionError, match='there twice'):
        read(path)
    path.write_bytes(sound_archive())
    with zipfile.ZipFile(path, 'a') as file:
        file.writestr('other/data.pkl', pickled(1))
    with pytest.raises(ConversionError, match=r'2 files data\.pkl'):
        read(path)


def in_sixty_four_bits(data: bytes | bytearray) -> bytes:
    """The same archive with every size and place where archives of more than 4 GiB have them."""
    end = data.rindex(b'PK\5\6')
    count, _, at = struct.unpack_from('<10xHLL', data, end)
    directory = b''
    begin = at
    for _ in range(count):
        head, stored, unpacked, name_size, rest, place = struct.unpack_from('<20sLLH12sL', data, at)
        name = data[at + 46 : at + 46 + name_size]
        extra = struct.pack('<HHB', 0x5555, 1, 0) + struct.pack('<HHQQQ', 1, 24, unpacked, stored, place)
        directory += struct.pack('<20sLLHH', head, 2**32 - 1, 2**32 - 1, name_size, len(extra)) + rest[2:]
        directory += struct.pack('<L', 2**32 - 1) + name + extra
        at += 46 + name_size
    total = struct.pack('<LQHHLLQQQQ', 0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), begin)
    locator = struct.pack('<LLQL', 0x07064B50, 0, begin + len(directory), 1)
    end_record = struct.pack('<L4H2LH', 0x06054B50, 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    return b''.join((data[:begin], directory, total, locator, end_record))


def test_sixty_four_bit_archives(tmp_path: Path) -> None:
    path, sound = tmp_path / 'x.pt', in_sixty_four_bits(sound_archive())
    path.write_bytes(sound)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    assert harmless(path, sound).tolist() == [0, 1, 2, 3]
    end, first, place = sound.rindex(b'PK\6\6'), entry(sound, 0), sound.rindex(b'PK\6\7')
    for position in (end + 32, end + 40, end + 48, place + 8, *range(first + 46 + 16 + 9, first + 46 + 16 + 33, 8)):
        for number in (2**32, 2**60, 2**64 - 1):
            hostile = bytearray(sound)
            hostile[position : position + 8] = struct.pack('<Q', number)
            assert harmless(path, bytes(hostile)) is None


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / 'x.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a.npy', b'\x93NUMPY\1\0' + bytes(100 << 20))
    assert path.stat().st_size < 200_000
    assert harmless(path, path.read_bytes()) is None
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a.npy', bytes(100 << 20))
    hostile = bytearray(path.read_bytes())
    for place in (22, entry(hostile, 0) + 24):  # it says that it unpacks to 100 bytes
        hostile[place : place + 4] = struct.pack('<L', 100)
    assert harmless(path, bytes(hostile)) is None


def test_a_turned_bit_in_a_compressed_npz(tmp_path: Path) -> None:
    path = tmp_path / 'x.npz'
    np.savez(path, a=np.arange(100))
    with zipfile.ZipFile(path) as file:
        content = file.read('a.npy')
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=0) as file:
        file.writestr('a.npy', content)
    sound = path.read_bytes()
    assert harmless(path, sound)['a'].tolist() == list(range(100))
    hostile = bytearray(sound)
    hostile[sound.index(b'\x42\0\0\0\0\0\0\0')] ^= 1
    assert harmless(path, bytes(hostile)) is None


@pytest.mark.parametrize(
    'header',
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + '9' * 5000 + ',), }',
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + '1,' * 70 + '), }',
        "{'descr': '<f8', 'fortran_order': False, 'shape': (0, " + '9' * 30 + '), }',
        "{'descr': '<f8', 'fortran_order': False, 'shape': __import__('os').system('true'), }",
        '(' * 9000,
        '',
    ],
)
def test_hostile_arrays(tmp_path: Path, header: str) -> None:
    for version, size in ((1, struct.pack('<H', len(header))), (2, struct.pack('<L', len(header))), (2, b'\xff' * 4)):
        with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as file:
            file.writestr('a.npy', b'\x93NUMPY' + bytes([version, 0]) + size + header.encode() + bytes(8))
        assert harmless(tmp_path / 'x.npz', (tmp_path / 'x.npz').read_bytes()) is None


# ---- safetensors


def weight(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = 'F32') -> dict[str, Any]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


HOSTILE_HEADERS = {
    'an exabyte': {'a': weight([2**58], [0, 2**60])},
    'a size that overflows': {'a': weight([2**62, 4], [0, 0])},
    'a negative size': {'a': weight([-2], [0, 8])},
    'two negative sizes': {'a': weight([-1, -2], [0, 8])},
    'a fraction': {'a': weight([2.0])},
    'no shape': {'a': {'dtype': 'F32', 'data_offsets': [0, 8]}},
    'a number for a tensor': {'a': 1},
    'true as a size': {'a': weight([True, 2])},
    'an end before the start': {'a': weight([2], [8, 0])},
    'a negative start': {'a': weight([2], [-8, 0])},
    'a hole': {'a': weight([1], [0, 4]), 'b': weight([0], [8, 8])},
    'a hole at the start': {'a': weight([1], [4, 8])},
    'bytes left over': {'a': weight([1], [0, 4])},
    'tensors that overlap': {'a': weight(), 'b': weight([1], [4, 8])},
    'the same place twice': {'a': weight(), 'b': weight()},
    'beyond the file': {'a': weight([4], [0, 16])},
    'a dtype of another size': {'a': weight(dtype='F64')},
    'an unknown dtype': {'a': weight(dtype='\x1b[31m')},
    'a number as dtype': {'a': weight(dtype=1)},
    'metadata of numbers': {'__metadata__': {'a': 1}, 'a': weight()},
    'metadata that is a list': {'__metadata__': [1], 'a': weight()},
    'half a surrogate': {'\ud800': weight()},
    '33 dimensions': {'a': weight([2] + [1] * 32)},
    'numbers of 4000 digits': {'a': weight([10**4000] * 30)},
    'a number of 5000 digits': b'{"a": {"dtype": "F32", "shape": [' + b'9' * 5000 + b'], "data_offsets": [0, 8]}}',
    'a list': [1],
    'deep lists': b'{"a":' + b'[' * 100_000,
    'deep dicts': b'{"a":' * 100_000,
    'a name twice': json.dumps({'a': weight()}).encode()[:-1] + b', ' + json.dumps({'a': weight()}).encode()[1:],
    'not UTF-8': b'{"\xff": 1}',
    'not JSON': b'{a}',
    'two headers': b'{}{}',
}


@pytest.mark.parametrize('name', HOSTILE_HEADERS)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    assert harmless(tmp_path / 'x', safetensors_file(HOSTILE_HEADERS[name], bytes(8))) is None


@pytest.mark.parametrize('size', [0, 1, 2**24, 2**31, 2**60, 2**63, 2**64 - 1])
def test_headers_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    assert harmless(tmp_path / 'x', safetensors_file({'a': weight()}, bytes(8), size)) is None


def test_the_sound_twin_of_the_hostile_headers(tmp_path: Path) -> None:
    data = safetensors_file(json.dumps({'a': weight(), '': weight([0, 3], [8, 8])}).encode() + b'   ', bytes(8))
    tree = harmless(tmp_path / 'x', data)
    assert {name: found.shape for name, found in tree.items()} == {'a': (2,), '': (0, 3)}


@write_over
@given(
    data=st.binary(max_size=300),
    start=st.sampled_from([b'', b'PK\3\4', b'{"weight_map":', b'\x20\0\0\0\0\0\0\0{', b'\x80\2']),
)
def test_any_bytes(tmp_path: Path, data: bytes, start: bytes) -> None:
    harmless(tmp_path / 'x', start + data)


@write_over
@given(
    name=st.text(), size=st.integers(0, 2**64), start=st.integers(-(2**64), 2**64), stop=st.integers(-(2**64), 2**64)
)
def test_any_place(tmp_path: Path, name: str, size: int, start: int, stop: int) -> None:
    tree = harmless(tmp_path / 'x', safetensors_file({name: weight([size], [start, stop])}, bytes(8)))
    assert tree is None or name == '__metadata__' or tree[name].shape == (2,)


def test_the_older_format_damaged(tmp_path: Path) -> None:
    """Torch reads these: only what it raises is ours to turn into ConversionError."""
    path, chance = tmp_path / 'x.pt', random.Random(0)
    torch.save({'weight': torch.arange(6.0), 'epoch': 3}, path, _use_new_zipfile_serialization=False)
    sound = path.read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((len(damaged), chance.randrange(1, len(damaged))))])
        try:
            read(path)
        except ConversionError:
            refused += 1
    assert refused > 100
