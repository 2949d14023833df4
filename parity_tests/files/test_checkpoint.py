"""A file or folder becomes a tree of plain values and mapped arrays, or an error that says what to do."""

import argparse
import collections
import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from convert.errors import ConversionError
from convert.files.checkpoint import Checkpoint, read
from convert.files.pickle_reader import Foreign
from convert.files.tensors import array
from flax_vit.folders.whole_files import sha256
from parity_tests.support.fuzz import Executed, archive, safetensors_file

FLOATS = ['float64', 'float32', 'float16', 'bfloat16']
FLOAT8S = ['float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz']
INTEGERS = ['int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64']
DTYPES = [*FLOATS, *FLOAT8S, *INTEGERS, 'bool', 'complex64', 'complex128']


def random_tensor(name: str, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    """Random bits of a dtype; 0 and 1 where it is bool."""
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits < 128 if dtype == torch.bool else bits.view(dtype)


def bits_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes, without the function under test."""
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tuple(tensor.shape), bytes(plain.flatten().view(torch.uint8).tolist()) if plain.numel() else b''


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def refusal(path: Path) -> str:
    """The message with which a file is refused. It names the file."""
    with pytest.raises(ConversionError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_header_whose_length_looks_like_json(tmp_path: Path) -> None:
    """Of safetensors, 31,520 bytes: the length is written as ' {'."""
    header = json.dumps({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).ljust(31_520).encode()
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + np.ones(1, '<f4').tobytes())
    assert read(tmp_path / 'x.safetensors').tree['a'].tolist() == [1]


def assert_mapped(found: np.ndarray) -> None:
    """The array is a view of a file, and cannot be written to."""
    assert not found.flags.writeable
    assert not found.flags.owndata


# ---- torch zip archives


@pytest.mark.parametrize('name', ['weights.pt', 'a b:c?.tar', 'weights', 'archive.t7', 'é.ckpt', 'data.pkl'])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    torch.save({'weight': torch.arange(3.0)}, tmp_path / name)
    checkpoint = read(tmp_path / name)
    assert checkpoint.tree['weight'].tolist() == [0, 1, 2]
    assert (checkpoint.format, checkpoint.files) == ('torch zip archive', (tmp_path / name,))
    assert read(str(tmp_path / name)).files == checkpoint.files


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('name', DTYPES)
def test_torch_dtypes_bit_for_bit(tmp_path: Path, name: str, protocol: int) -> None:
    tensor = random_tensor(name)
    torch.save({'weight': tensor}, tmp_path / 'x.pt', pickle_protocol=protocol)
    found = read(tmp_path / 'x.pt').tree['weight']
    assert found.dtype == dtype_of(name)
    assert (found.shape, found.tobytes()) == bits_of(tensor)
    assert_mapped(found)


def test_strided_shared_expanded_empty_and_scalar_tensors(tmp_path: Path) -> None:
    base = torch.arange(120.0).reshape(4, 5, 6)
    tensors = {
        'base': base,
        'transposed': base.permute(2, 0, 1),
        'part': base[1:3, ::2, 3:],
        'overlapping': base.flatten().as_strided((5, 3), (2, 1), 7),
        'expanded': torch.tensor([1.0, 2.0]).expand(3, 2),
        'one wide': base[:, :1],
        'empty': torch.zeros(0, 7),
        'emptied': base[:, 2:2],
        'scalar': torch.tensor(3.0),
        'element': base[1, 2, 3],
        'parameter': torch.nn.Parameter(base[0]),
        'buffer': torch.nn.Buffer(torch.ones(2)),
    }
    tensors['noted'] = torch.nn.Parameter(torch.ones(2))
    tensors['noted'].note = 'a parameter with an attribute'  # type: ignore[attr-defined]
    torch.save(tensors, tmp_path / 'x.pt')
    tree = read(tmp_path / 'x.pt').tree
    assert list(tree) == list(tensors)
    for name, tensor in tensors.items():
        assert (tree[name].shape, tree[name].tobytes()) == bits_of(tensor), name
        assert_mapped(tree[name])
    assert np.shares_memory(tree['base'], tree['transposed'])
    assert np.shares_memory(tree['base'], tree['part'])
    assert tree['expanded'].strides[0] == 0


def test_the_values_beside_the_weights(tmp_path: Path) -> None:
    tree = {
        'list': [1, -1, 2.5, True, None, 'text', b'bytes', 2**70, [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]],
        'ordered': collections.OrderedDict(a=1),
        'default': collections.defaultdict(list, b=[2]),
        'size': torch.Size([2, 3]),
        3: {1.5: 'numbers too', None: 0, b'a': 'bytes'},
        'numpy': [np.float64(0.5), np.int64(3), np.bool_(True), np.float32(0.25)],
    }
    torch.save(tree | {'tuples': {(0, 'pair'): 'as keys'}, 'big': 10**2000}, tmp_path / 'x.pt', pickle_protocol=4)
    found = read(tmp_path / 'x.pt').tree
    assert found.pop('tuples') == {Foreign('key 0'): 'as keys'}  # their hashes may be made to collide
    assert found.pop('big') == Foreign('builtins.int')
    assert found == {**tree, 'size': (2, 3)}
    assert [type(value) for value in found['numpy']] == [float, int, bool, float]
    assert all(type(found[key]) is dict for key in ('ordered', 'default'))
    assert type(found['size']) is tuple


class Configuration:
    """A class of the trainer's own."""

    def __init__(self) -> None:
        self.rate = 0.1
        self.parts = [torch.ones(2)]


class Slotted:
    """One without a __dict__."""

    __slots__ = ('rate',)

    def __init__(self) -> None:
        self.rate = 0.1


class Settings(dict):  # type: ignore[type-arg]
    """A dict of the trainer's own, whose items are its attributes as well."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = dict(items)


class Parts(NamedTuple):
    """A tuple of the trainer's own."""

    model: dict[str, Any]
    epoch: int


def refused(*arguments: Any) -> None:
    """Never called."""
    raise AssertionError


class ByFunction:
    """Made by a function, of parts that may mean anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return refused, ({'weight': torch.ones(2)},)


class Empty:
    """Nothing to read in it."""


class Special(torch.Tensor):
    """A tensor whose numbers may mean something else."""


@pytest.mark.filterwarnings('ignore:.*(quantize|Quant|ComplexHalf|Sparse)')
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_foreign_objects_are_passed_over(tmp_path: Path, protocol: int) -> None:
    foreign = {
        f'{__name__}.Empty': Empty(),
        f'{__name__}.Special': torch.ones(2).as_subclass(Special),
        'torch.nn.modules.linear.Linear': torch.nn.Linear(2, 2),
        'torch.float32': torch.float32,
        'torch.device': torch.device('cpu'),
        'torch.storage.UntypedStorage': torch.ones(3).untyped_storage(),
        f'{__name__}.refused': ByFunction(),
        f'{type(tmp_path).__module__}.PosixPath': tmp_path,  # 3.13 has its own place for it
        'collections.Counter': collections.Counter('a'),
        'torch._utils._rebuild_sparse_tensor': torch.eye(3).to_sparse(),
        'torch._utils._rebuild_meta_tensor_no_storage': torch.empty(2, device='meta'),
        'torch._utils._rebuild_qtensor': torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        'torch._utils._rebuild_tensor_v3': torch.ones(2, dtype=torch.complex32),
        'torch._utils._rebuild_tensor_v2': torch.ones(2, dtype=torch.complex64).conj(),
    }
    read_too = {'weight': torch.ones(2), 'arguments': argparse.Namespace(rate=0.1)}
    torch.save(read_too | foreign | {'set': {1, 2}}, tmp_path / 'x.pt', pickle_protocol=protocol)
    tree = read(tmp_path / 'x.pt').tree
    assert tree.pop('weight').tolist() == [1, 1]
    assert tree.pop('arguments') == {'rate': 0.1}
    assert tree.pop('set').name.endswith('.set')
    assert all(isinstance(value, Foreign) for value in tree.values())
    assert {name: value.name for name, value in tree.items()} == {name: name for name in foreign}


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_items_and_attributes_of_foreign_objects_are_read(tmp_path: Path, protocol: int) -> None:
    """They are plain data in the file, whatever the class would have done with them."""
    tree = {
        'settings': Settings(rate=0.1, inner=Settings(depth=3)),
        'user': collections.UserDict(rate=0.1),
        'ordered': type('Mine', (collections.OrderedDict,), {'__module__': __name__})(rate=0.1),
        'object': Configuration(),
        'slots': Slotted(),
        'tuple': Parts({'rate': 0.1}, 3),
    }
    globals()['Mine'] = type(tree['ordered'])  # pickle looks it up
    torch.save(tree, tmp_path / 'x.pt', pickle_protocol=protocol)
    found = read(tmp_path / 'x.pt').tree
    assert found['object'].pop('parts')[0].tolist() == [1, 1]
    assert found == {
        'settings': {'rate': 0.1, 'inner': {'depth': 3}},
        'user': {'data': {'rate': 0.1}},
        'ordered': {'rate': 0.1},
        'object': {'rate': 0.1},
        'slots': {'rate': 0.1},
        'tuple': ({'rate': 0.1}, 3),
    }


class OnTPU:
    """Saved as torch_xla saves its tensors."""

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.parts = tensor, dtype, 'xla:0', False

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, self.parts


def test_tensors_from_other_devices(tmp_path: Path) -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    torch.save({'same': OnTPU(half, torch.bfloat16), 'other': OnTPU(half, torch.float32)}, tmp_path / 'x.pt')
    tree = read(tmp_path / 'x.pt').tree
    assert tree['same'].dtype == ml_dtypes.bfloat16
    assert tree['other'] == Foreign('torch.Tensor')


def test_a_model_with_its_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    saved = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': 3}
    torch.save(saved, tmp_path / 'x.pt')
    tree = read(tmp_path / 'x.pt').tree
    for name, tensor in model.state_dict().items():
        assert tree['model'][name].tobytes() == tensor.numpy().tobytes()
    assert tree['optimizer']['state'][0]['exp_avg'].shape == (4, 3)
    assert tree['optimizer']['param_groups'][0]['betas'] == (0.9, 0.999)
    assert list(tree['model']) == list(model.state_dict())


def test_an_archive_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'weight': torch.ones(2)}, tmp_path / 'x.pt')
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / 'x.pt').tree['weight'].tolist() == [1, 1]


def test_the_arrays_outlive_the_file(tmp_path: Path) -> None:
    torch.save({'weight': torch.arange(1000)}, tmp_path / 'x.pt')
    tree = read(tmp_path / 'x.pt').tree
    (tmp_path / 'x.pt').unlink()
    assert tree['weight'].sum() == 499_500


def test_a_whole_module_is_refused_with_the_lines_that_save_its_weights(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'x.pt')
    message = refusal(tmp_path / 'x.pt')
    assert 'torch.nn.modules.linear.Linear' in message
    assert message.endswith("weights_only=False)\n    torch.save(model.state_dict(), 'weights.pt')")
    follow(message, tmp_path)
    assert read(tmp_path / 'weights.pt').tree['weight'].shape == (2, 2)


def follow(message: str, folder: Path) -> None:
    """Do what the indented lines of a message say, in the folder."""
    lines = [line.removeprefix('    ') for line in message.split('\n') if line.startswith('    ')]
    with contextlib.chdir(folder):
        exec('\n'.join(lines), {'torch': torch, 'joblib': joblib, 'numpy': np})


@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore::DeprecationWarning')
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / 'x.pt'))
    message = refusal(tmp_path / 'x.pt')
    assert 'TorchScript' in message
    (tmp_path / 'x.pt').rename(tmp_path / 'model.pt')
    follow(message, tmp_path)
    assert read(tmp_path / 'weights.pt').tree['weight'].shape == (2, 2)


def program_of(tree: Any) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of a saved tree."""
    file = io.BytesIO()
    torch.save(tree, file)
    with zipfile.ZipFile(file) as content:
        records = {name.split('/', 1)[1]: content.read(name) for name in content.namelist()}
    return records['data.pkl'], {name[5:]: data for name, data in records.items() if name.startswith('data/')}


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'x.pt'
    program, storages = program_of({'weight': torch.ones(3)})
    path.write_bytes(archive(program, storages))
    assert read(path).tree['weight'].tolist() == [1, 1, 1]
    path.write_bytes(archive(program, storages, compression=zipfile.ZIP_DEFLATED))
    assert 'compressed' in refusal(path)
    path.write_bytes(archive(program, {}))
    assert 'is not there in full' in refusal(path)
    path.write_bytes(archive(program, {'0': storages['0'][:8]}))
    assert 'is not there in full' in refusal(path)
    path.write_bytes(archive(program, storages).replace(b'little', b'big!!!'))
    assert 'big-endian' in refusal(path)
    path.write_bytes(archive(program, storages).replace(b'weight', b'height', 1))
    assert 'checksum' in refusal(path)
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('holiday\n.jpg', b'')
    assert "'holiday\\n.jpg'" in refusal(path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / 'executed'
    hostile = Executed(marker)
    torch.save({'weight': torch.ones(2), 'other': hostile}, tmp_path / 'zip.pt')
    torch.save({'weight': torch.ones(2), 'other': hostile}, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    torch.save(hostile, tmp_path / 'top.pt')
    np.savez(tmp_path / 'x.npz', weight=np.ones(2), other=np.array([hostile]))
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps({'weight': hostile}))

    assert isinstance(read(tmp_path / 'zip.pt').tree['other'], Foreign)
    assert isinstance(read(tmp_path / 'x.npz').tree['other'], Foreign)
    assert isinstance(read(tmp_path / 'old.pt').tree['other'], Foreign)
    assert isinstance(read(tmp_path / 'x.pkl').tree['weight'], Foreign)
    refusal(tmp_path / 'top.pt')
    assert not marker.exists()
    torch.load(tmp_path / 'zip.pt', weights_only=False)
    assert marker.exists()  # they would have


# ---- torch's older format


@pytest.mark.parametrize('protocol', [2, 4])
def test_the_older_format(tmp_path: Path, protocol: int) -> None:
    tensors = {name: random_tensor(name) for name in DTYPES}
    base = torch.arange(24.0).reshape(4, 6)
    tensors |= {
        'base': base,
        'part': base.T[1:, ::2],
        'empty': base[:0],
        'tied': base,
        'parameter': torch.nn.Parameter(base),
    }
    saved = {'state_dict': collections.OrderedDict(tensors), 'epoch': 3, 'size': torch.Size([1]), 'rest': [(1, 'x')]}
    with warnings.catch_warnings(action='ignore'):
        saved['int8'] = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        path = tmp_path / 'x.pth'
        torch.save(saved, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    checkpoint = read(path)
    assert checkpoint.format == "torch's older format"
    found = checkpoint.tree.pop('state_dict')
    assert checkpoint.tree.pop('int8') == Foreign('torch._utils._rebuild_qtensor')
    assert checkpoint.tree == {'epoch': 3, 'size': (1,), 'rest': [(1, 'x')]}
    for name, tensor in tensors.items():
        assert found[name].dtype == array(tensor).dtype
        assert (found[name].shape, found[name].tobytes()) == bits_of(tensor), name
        assert_mapped(found[name])
    assert np.shares_memory(found['base'], found['part'])


def test_what_is_refused_of_the_older_format(tmp_path: Path) -> None:
    path = tmp_path / 'x.pth'
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    assert 'torch.nn.modules.linear.Linear' in refusal(path)
    follow(refusal(path), tmp_path)
    assert read(tmp_path / 'weights.pt').tree['weight'].shape == (2, 2)
    torch.save({'weight': torch.ones(1).expand(10**12)}, path, _use_new_zipfile_serialization=False)
    assert 'expanded' in refusal(path)
    torch.save({'weight': torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    sound = path.read_bytes()
    path.write_bytes(sound[:-8])
    assert 'not there in full' in refusal(path)
    path.write_bytes(sound.replace(b'little_endianq\x02\x88', b'little_endianq\x02\x89'))
    assert 'big-endian' in refusal(path)


WITHOUT_TORCH = """
import sys
sys.modules['torch'] = None
from convert.files.checkpoint import read
assert read('zip.pt').tree['weight'].tolist() == [1, 2]
assert read('x.safetensors').tree['weight'].dtype == 'bfloat16'
assert read('old.pt').tree['weight'].tolist() == [1, 1]
assert read('plain.pkl').tree['weight'].tolist() == [1, 1]
"""


def test_without_torch(tmp_path: Path) -> None:
    torch.save({'weight': torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, tmp_path / 'zip.pt')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    (tmp_path / 'plain.pkl').write_bytes(pickle.dumps({'weight': torch.ones(2)}))
    safetensors.torch.save_file({'weight': torch.ones(2, dtype=torch.bfloat16)}, tmp_path / 'x.safetensors')
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_TORCH],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('name', DTYPES)
def test_a_tensor_becomes_an_array_bit_for_bit(name: str) -> None:
    tensor = random_tensor(name)
    found = array(tensor)
    assert found.dtype == dtype_of(name)
    assert (found.shape, found.tobytes()) == bits_of(tensor)
    assert found.__array_interface__['data'][0] == tensor.data_ptr()


def test_tensors_of_every_form_become_arrays() -> None:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    part = base.T[::2].clone(memory_format=torch.preserve_format).requires_grad_()
    for tensor in (part, base.T[1:, ::2], torch.nn.Parameter(base), base[1, 2], base[:0], torch.ones(1).expand(3, 2)):
        assert (array(tensor).shape, array(tensor).tobytes()) == bits_of(tensor)
    turned = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert array(turned).tolist() == [1 - 2j, 3 + 4j]
    assert array(turned.imag).tolist() == [-2, 4]


@pytest.mark.filterwarnings('ignore:.*(quantize|Quant|ComplexHalf|nested)')
def test_tensors_without_plain_numbers_are_refused() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    half = torch.ones(2, dtype=torch.complex32)
    for tensor in (torch.eye(3).to_sparse(), torch.empty(2, device='meta'), quantized, half):
        with pytest.raises(ConversionError):
            array(tensor)


# ---- safetensors


@pytest.mark.parametrize('name', sorted(set(DTYPES) - {'complex128'}))
def test_safetensors_dtypes_bit_for_bit(tmp_path: Path, name: str) -> None:
    tensors = {
        'b': random_tensor(name),
        'a': random_tensor(name, (1,)),
        'c': random_tensor('float32'),
        'd': torch.zeros(0, 2),
    }
    tensors['e'] = torch.tensor(2.0)
    safetensors.torch.save_file(tensors, tmp_path / 'model', {'format': 'pt'})
    checkpoint = read(tmp_path / 'model')
    assert (checkpoint.format, checkpoint.metadata) == ('safetensors', {'format': 'pt'})
    assert checkpoint.tree['a'].dtype == dtype_of(name)
    for key, tensor in tensors.items():
        assert (checkpoint.tree[key].shape, checkpoint.tree[key].tobytes()) == bits_of(tensor)
        assert_mapped(checkpoint.tree[key])


def test_safetensors_of_less_than_a_byte(tmp_path: Path) -> None:
    header = {'weight': {'dtype': 'F4', 'shape': [4], 'data_offsets': [0, 2]}}
    (tmp_path / 'x').write_bytes(safetensors_file(header, b'12'))
    assert "'F4'" in refusal(tmp_path / 'x')


# ---- shards


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards of safetensors and their index."""
    tensors = {'c': torch.ones(2), 'a': torch.arange(4, dtype=torch.bfloat16), 'b': torch.zeros(2, 3)}
    first, second = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
    safetensors.torch.save_file({'a': tensors['a'], 'c': tensors['c']}, folder / first)
    safetensors.torch.save_file({'b': tensors['b']}, folder / second)
    write_index(folder, {'c': first, 'a': first, 'b': second})
    return tensors


def write_index(folder: Path, owners: dict[str, str]) -> Path:
    path = folder / 'model.safetensors.index.json'
    path.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': owners}))
    return path


def test_shards_by_index_and_by_folder(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'optimizer.pt').write_text('the trainer puts it there')
    for path in (tmp_path, tmp_path / 'model.safetensors.index.json'):
        checkpoint = read(path)
        assert checkpoint.format == 'safetensors, 2 shards'
        assert [file.name[:11] for file in checkpoint.files] == ['model.safet', 'model-00001', 'model-00002']
        assert list(checkpoint.tree) == list(tensors)
        for name, tensor in tensors.items():
            assert (checkpoint.tree[name].shape, checkpoint.tree[name].tobytes()) == bits_of(tensor)
            assert_mapped(checkpoint.tree[name])


def test_shards_by_torch(tmp_path: Path) -> None:
    torch.save({'a': torch.ones(2)}, tmp_path / 'pytorch_model-1.bin')
    torch.save({'b': torch.ones(2)}, tmp_path / 'pytorch_model-2.bin', _use_new_zipfile_serialization=False)
    owners = {'a': 'pytorch_model-1.bin', 'b': 'pytorch_model-2.bin'}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': owners}))
    assert read(tmp_path).tree.keys() == {'a', 'b'}
    assert read(tmp_path).format == 'torch zip archive, 2 shards'


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', 'a/b', '..', '.', '', 'a\0b', 'a\\b'])
def test_shards_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    assert 'plain name' in refusal(write_index(tmp_path, {'a': name}))


def test_a_shard_may_be_a_link_only_within_its_folder_or_the_hubs_cache(tmp_path: Path) -> None:
    blobs, elsewhere = tmp_path / 'blobs', tmp_path / 'elsewhere'
    snapshot = tmp_path / 'snapshots' / '0a1b2c'
    for folder in (blobs, elsewhere, snapshot):
        folder.mkdir(parents=True)
    sharded(snapshot)
    shard = snapshot / 'model-00001-of-00002.safetensors'
    for folder, allowed in ((blobs, True), (elsewhere, False), (snapshot, True)):
        shard.rename(folder / 'kept')
        shard.symlink_to(folder / 'kept')
        if allowed:
            assert read(snapshot).tree.keys() == {'a', 'b', 'c'}
        else:
            assert 'link' in refusal(snapshot)
        shard.unlink()
        (folder / 'kept').rename(shard)


def test_shards_must_hold_what_the_index_says(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
    message = refusal(write_index(tmp_path, {'a': first, 'b': second}))
    assert "+ 'c'" in message
    message = refusal(write_index(tmp_path, {'a': first, 'c': first, 'b': second, 'd': second}))
    assert "- 'd'" in message
    message = refusal(write_index(tmp_path, {'a': first, 'b': first, 'c': second}))
    assert "- 'b'\n+ 'c'" in message
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError):
        read(write_index(tmp_path, {'a': first, 'c': first, 'b': second}))
    index = write_index(tmp_path, {'a': 'model.safetensors.index.json'})
    assert 'known format' in refusal(index)  # it names itself
    (tmp_path / 'folder').mkdir()
    assert 'no file' in refusal(write_index(tmp_path, {'a': 'folder'}))
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert 'twice' in refusal(index)
    index.write_text('{"hidden_size": 3}')
    assert 'JSON' in refusal(index)


# ---- npz


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    arrays = {
        'a/b': np.arange(6.0).reshape(2, 3),
        'c': np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        'd': np.array(3),
        'e': np.zeros((0, 4), np.complex64),
        'f': np.array([True, False]),
        'g': np.arange(300_000, dtype=np.uint8),
    }
    save(tmp_path / 'x.npz', **arrays)
    checkpoint = read(tmp_path / 'x.npz')
    assert checkpoint.format == 'numpy npz'
    for name, expected in arrays.items():
        found = checkpoint.tree[name]
        assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())
        assert_mapped(found)


@pytest.mark.filterwarnings('ignore:Custom dtypes are saved')
def test_npz_with_other_things(tmp_path: Path) -> None:
    bfloat16 = np.ones(2, ml_dtypes.bfloat16)
    np.savez(
        tmp_path / 'x.npz', w=np.ones(2), text=np.array(['a']), object=np.array([{}]), big=np.ones(2, '>f4'), b=bfloat16
    )
    tree = read(tmp_path / 'x.npz').tree
    assert tree.pop('w').tolist() == [1, 1]
    assert (tree['big'].dtype, tree.pop('big').tolist()) == (np.float32, [1, 1])
    assert tree.pop('b').tobytes() == bfloat16.tobytes()  # numpy calls it two bytes
    kinds = {'text': '<U1', 'object': '|O'}
    assert tree == {name: Foreign(f'numpy.ndarray of {kind}') for name, kind in kinds.items()}


def test_an_npz_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / 'x.npz', a=np.zeros(80 << 20, np.uint8))
    assert (tmp_path / 'x.npz').stat().st_size < 200_000
    assert 'unpack' in refusal(tmp_path / 'x.npz')


# ---- folders and other files


def test_a_folder_with_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'README.md').write_text('')
    assert "a folder without a checkpoint, also one level down: it holds ['README.md']" in refusal(tmp_path)
    torch.save({'weight': torch.ones(2)}, tmp_path / 'pytorch_model.bin')
    assert read(tmp_path).files == (tmp_path / 'pytorch_model.bin',)
    np.savez(tmp_path / 'other.npz', a=np.ones(1))
    assert "['other.npz', 'pytorch_model.bin']" in refusal(tmp_path)


@pytest.mark.parametrize(
    ('names', 'advice'),
    [
        (['.metadata', '__0_0.distcp'], 'torch.distributed.checkpoint.format_utils dcp_to_torch'),
        (['latest', 'global_step100', 'zero_to_fp32.py'], 'zero_to_fp32.py'),
        (['bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt', 'mp_rank_00_model_states.pt'], 'zero_to_fp32.py'),
        (['saved_model.pb', 'variables'], 'TensorFlow'),
        (['model.ckpt.index', 'model.ckpt.data-00000-of-00001'], 'TensorFlow'),
        (['data.pkl', 'data', 'version'], 'content of a torch zip archive'),
    ],
)
def test_folders_of_parts(tmp_path: Path, names: list[str], advice: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b'x')
    assert advice in refusal(tmp_path)


@pytest.mark.parametrize('below', [True, False])
def test_steps_without_zero_are_whole(tmp_path: Path, below: bool) -> None:
    folder = tmp_path / 'global_step100' if below else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / ('mp_rank_00_model_states.pt' if below else 'global_step100.pt')
    torch.save({'module': {'weight': torch.ones(2)}}, path)
    (tmp_path / 'latest').write_text('global_step100')
    assert read(tmp_path).files == read(path).files == (path,)
    for rank in range(2):
        torch.save({}, folder / f'zero_pp_rank_{rank}_mp_rank_00_optim_states.pt')
    assert 'zero_to_fp32.py' in refusal(tmp_path)


def test_a_part_alone(tmp_path: Path) -> None:
    for name, advice in {'__0_0.distcp': 'dcp_to_torch', 'zero_pp_rank_0_optim_states.pt': 'zero_to_fp32.py'}.items():
        torch.save({}, tmp_path / name)
        assert advice in refusal(tmp_path / name)


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.mark.parametrize(
    ('content', 'advice'),
    [
        (b'', 'empty'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'git lfs pull'),
        (b'<!DOCTYPE html><html>', 'web page'),
        (b'<HTML>', 'web page'),
        (gzip.compress(b'what?', mtime=0), "compressed: no checkpoint of a known format; it begins with b'what?'"),
        (gzip.compress(gzip.compress(b'x', mtime=0), mtime=0), 'compressed: no checkpoint of a known format'),
        (gzip.compress(b'x', mtime=0) * 2, 'more than one'),
        (gzip.compress(b'x', mtime=0)[:-1], 'cut off'),
        (b'\x28\xb5\x2f\xfd1', 'unpack it first'),
        (b'\x89HDF\r\n\x1a\n123', 'HDF5'),
        (npy(np.ones(2)), 'numpy.savez'),
        (b'\x1c\0\0\0TFL3\x14', 'TensorFlow Lite'),
        (b'\x08\x08\x12\x07pytorch\x1a\x05', 'ONNX'),
        (b'GGUF\3', 'GGUF'),
        (pickle.dumps(torch.nn.Linear(2, 2)), 'joblib.load('),
        (b'(dp0\n.', 'begins with'),
        (b'{"a": 1}', 'JSON'),
        (b'{"a": ', 'JSONDecodeError'),
        (b'model_checkpoint_path: "x"', 'TensorFlow'),
        (b'x' * 40 + 0xDB4775248B80FB57.to_bytes(8, 'little'), 'TensorFlow'),
        (bytes(1000), 'zeros'),
        (b'PK\3\4', 'cut off'),
        (b'\x10\0\0\0\0\0\0\0{"a":', 'cut off'),
        (b'what is this?\x1b[2J', 'begins with'),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, advice: str) -> None:
    (tmp_path / 'model.pth').write_bytes(content)
    assert advice in refusal(tmp_path / 'model.pth')
    assert '\x1b' not in refusal(tmp_path / 'model.pth')


def test_a_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'x.pth.tar', 'w') as file:
        file.add(__file__, 'test.py')
    assert 'unpack it first' in refusal(tmp_path / 'x.pth.tar')


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='missing'):
        read(tmp_path / 'missing.pt')
    os.mkfifo(tmp_path / 'pipe')
    assert 'no file' in refusal(tmp_path / 'pipe')  # and does not wait
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError):
        read(tmp_path / 'link')
    if os.geteuid():
        (tmp_path / 'secret').write_bytes(b'x')
        (tmp_path / 'secret').chmod(0)
        with pytest.raises(PermissionError):
            read(tmp_path / 'secret')


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / 'x').write_bytes(b'abc')
    assert sha256(tmp_path / 'x') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


def test_a_checkpoint_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Checkpoint({}, 'safetensors', ()).tree = {}  # type: ignore[misc]
