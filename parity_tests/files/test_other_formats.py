"""Plain pickles, joblib's and numpy's files, packed files, torch.export's: read without running anything."""

import bz2
import gzip
import io
import lzma
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import ml_dtypes
import numpy as np
import pytest
import torch
from torch.package.package_exporter import PackageExporter
from vit_pytorch.simple_vit import SimpleViT

import convert
from convert.files.checkpoint import read
from convert.files.pickle_reader import Foreign
from parity_tests.files.test_checkpoint import DTYPES, assert_mapped, bits_of, dtype_of, follow, random_tensor, refusal
from parity_tests.support.pages import ROOT

protocols = pytest.mark.parametrize('protocol', [2, 3, 4, 5])
WAYS: dict[str, Callable[[Any, Path, int], Any]] = {
    'pickle': lambda tree, path, protocol: path.write_bytes(pickle.dumps(tree, protocol)),
    'joblib': lambda tree, path, protocol: joblib.dump(tree, path, protocol=protocol),
    'torch': lambda tree, path, protocol: torch.save(tree, path, pickle_protocol=protocol),
    "torch's older": lambda tree, path, protocol: torch.save(
        tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    ),
}
ways = pytest.mark.parametrize('way', WAYS)


# ---- arrays and tensors, however they are pickled


@protocols
@ways
def test_arrays_bit_for_bit(tmp_path: Path, way: str, protocol: int) -> None:
    base = np.arange(120.0).reshape(4, 5, 6)
    arrays = {
        **{name: random_tensor(name).numpy() for name in DTYPES if dtype_of(name).type.__module__ == 'numpy'},
        'bfloat16': np.arange(5).astype(ml_dtypes.bfloat16),
        'long': np.arange(50_000, dtype=np.float32),
        'columns first': np.asfortranarray(base),
        'part': base[1:3, ::2, 3:],
        'empty': base[:0],
        'scalar': np.array(3.0),
        'for reading': np.frombuffer(b'12345678', np.float32),
        'tied': base,
        'base': base,
    }
    WAYS[way](arrays, tmp_path / 'x', protocol)
    tree = read(tmp_path / 'x').tree
    assert list(tree) == list(arrays)
    for name, expected in arrays.items():
        found = tree[name]
        assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes()), name
        assert not found.flags.writeable


@protocols
@ways
def test_big_endian_arrays_get_this_machines_order(tmp_path: Path, way: str, protocol: int) -> None:
    WAYS[way]({'a': np.arange(5, dtype='>f4'), 'b': np.arange(5, dtype='>i8')}, tmp_path / 'x', protocol)
    tree = read(tmp_path / 'x').tree
    assert {name: found.dtype for name, found in tree.items()} == {'a': np.float32, 'b': np.int64}
    assert all(found.tolist() == [0, 1, 2, 3, 4] for found in tree.values())


@protocols
@pytest.mark.parametrize('way', ['pickle', 'joblib'])
def test_tensors_in_plain_pickles(tmp_path: Path, way: str, protocol: int) -> None:
    base = torch.arange(120.0).reshape(4, 5, 6)
    tensors = {name: random_tensor(name) for name in DTYPES}
    tensors |= {
        'base': base,
        'part': base[1:3, ::2, 3:],
        'turned': base.permute(2, 0, 1),
        'empty': base[:0],
        'one': base[1, 2, 3],
    }
    tensors |= {'parameter': torch.nn.Parameter(base), 'expanded': torch.ones(2).expand(3, 2)}
    WAYS[way]({'state_dict': tensors, 'epoch': 3}, tmp_path / 'x', protocol)
    checkpoint = read(tmp_path / 'x')
    assert (checkpoint.format, checkpoint.tree['epoch']) == ('pickle', 3)
    for name, tensor in tensors.items():
        found = checkpoint.tree['state_dict'][name]
        assert (found.shape, found.tobytes()) == bits_of(tensor), name
        assert found.dtype == (dtype_of(name) if name in DTYPES else np.float32)
        assert_mapped(found)


def test_arrays_of_other_things_are_passed_over(tmp_path: Path) -> None:
    tree = {'text': np.array(['a', 'b']), 'when': np.array(['2020-01-01'], 'M8[D]'), 'rows': np.ones(2, 'i4,f4')}
    tree['masked'] = np.ma.masked_array([1.0, 2.0], [True, False])
    (tmp_path / 'x').write_bytes(pickle.dumps(tree | {'weight': np.ones(2)}))
    found = read(tmp_path / 'x').tree
    assert found.pop('weight').tolist() == [1, 1]
    assert all(isinstance(value, Foreign) for value in found.values())


class OnTPU:
    """Pickled as torch before 2.3 did a tensor on an XLA device, bfloat16 by way of float32."""

    def __init__(self, tensor: torch.Tensor) -> None:
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        self.parts = wide.numpy(), tensor.dtype, 'xla:1', False

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_device_tensor_from_numpy, self.parts


@protocols
def test_tensors_of_older_tpus(tmp_path: Path, protocol: int) -> None:
    tensors = {name: torch.arange(6.0).reshape(2, 3).to(getattr(torch, name)) for name in ('float32', 'bfloat16')}
    torch.save({name: OnTPU(tensor) for name, tensor in tensors.items()}, tmp_path / 'x', pickle_protocol=protocol)
    for name, tensor in tensors.items():
        found = read(tmp_path / 'x').tree[name]
        assert (found.dtype, found.shape, found.tobytes()) == (dtype_of(name), *bits_of(tensor))


def test_a_whole_module_in_a_plain_pickle(tmp_path: Path) -> None:
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(torch.nn.Linear(2, 3)))
    follow(refusal(tmp_path / 'x.pkl'), tmp_path)
    assert read(tmp_path / 'weights.pt').tree['weight'].shape == (3, 2)


def test_a_dict_that_numpy_saved(tmp_path: Path) -> None:
    np.save(tmp_path / 'x.npy', {'weight': np.ones(2, np.float16)})  # type: ignore[arg-type]
    checkpoint = read(tmp_path / 'x.npy')
    assert (checkpoint.format, checkpoint.tree['weight'].tolist()) == ('numpy npy', [1, 1])


@pytest.mark.parametrize('cut', [1, 8, 100])
def test_joblib_cut_off(tmp_path: Path, cut: int) -> None:
    joblib.dump({'weight': np.arange(100.0)}, tmp_path / 'x')
    content = (tmp_path / 'x').read_bytes()
    (tmp_path / 'x').write_bytes(content[:-cut])
    refusal(tmp_path / 'x')


# ---- packed files


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', method) as archive:
        archive.mkdir('folder')
        archive.writestr('folder/weights.pt', content)
    return file.getvalue()


PACKED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    'gzip': (gzip.compress, 'compressed'),
    'bzip2': (bz2.compress, 'compressed'),
    'xz': (lzma.compress, 'compressed'),
    'lzma': (lambda data: lzma.compress(data, lzma.FORMAT_ALONE), 'compressed'),
    'zlib': (zlib.compress, 'compressed'),
    'zip': (zipped, "'folder/weights.pt' in a zip archive"),
    'zip, stored': (lambda data: zipped(data, zipfile.ZIP_STORED), "'folder/weights.pt' in a zip archive"),
}


@pytest.mark.parametrize('packed', PACKED)
@pytest.mark.parametrize('way', [*WAYS, 'safetensors'])
def test_packed_files(tmp_path: Path, packed: str, way: str) -> None:
    from safetensors.numpy import save

    path, tree = tmp_path / 'x', {'weight': np.arange(1000, dtype=np.float32)}
    if way == 'safetensors':
        path.write_bytes(save(tree))
    else:
        WAYS[way](tree, path, 4)
    pack, words = PACKED[packed]
    path.write_bytes(pack(path.read_bytes()))
    checkpoint = read(path)
    assert checkpoint.tree['weight'].tolist() == list(range(1000))
    assert checkpoint.format.endswith(words)
    for cut in (1, 20):
        path.write_bytes(pack(path.read_bytes())[:-cut])
        refusal(path)


@pytest.mark.parametrize('compress', ['zlib', 'gzip', 'bz2', 'lzma', 'xz'])
def test_what_joblib_packs(tmp_path: Path, compress: str) -> None:
    joblib.dump({'weight': np.arange(1000.0)}, tmp_path / 'x', compress=(compress, 3))
    assert read(tmp_path / 'x').tree['weight'].tolist() == list(range(1000))


@pytest.mark.parametrize('packed', PACKED)
def test_what_would_fill_the_memory_is_refused(tmp_path: Path, packed: str) -> None:
    if packed != 'zip, stored':
        (tmp_path / 'x').write_bytes(PACKED[packed][0](bytes(80 << 20)))
        assert 'unpack to' in refusal(tmp_path / 'x')


def test_several_in_a_zip_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'x', 'w') as file:
        file.writestr('a.pt', b'')
        file.writestr('b.pt', b'')
    assert "it holds ['a.pt', 'b.pt']. Unpack it, and give the checkpoint" in refusal(tmp_path / 'x')


# ---- torch.export, torch.package


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_weights_beside_an_exported_program(tmp_path: Path, dtype: torch.dtype) -> None:
    module = SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20).to(dtype)
    torch.export.save(torch.export.export(module, (torch.ones(1, 3, 8, 8, dtype=dtype),)), tmp_path / 'x.pt2')
    checkpoint = read(tmp_path / 'x.pt2')
    assert checkpoint.format == 'torch.export archive'
    for name, tensor in module.state_dict().items():
        found = checkpoint.tree[name]
        assert (found.shape, found.tobytes()) == bits_of(tensor)
        assert_mapped(found)
    assert convert.inspect(tmp_path / 'x.pt2').fields['image_size'].value == 8  # by the table, which is kept, too


BEFORE_2_8 = ROOT / 'parity_tests/golden/exported-by-torch-2.5.pt2'


def test_weights_beside_a_program_that_torch_exported_before_2_8() -> None:
    """A Linear, a parameter in bfloat16 and a buffer that is in no state dict, as torch 2.5 wrote them."""
    tree = read(BEFORE_2_8).tree
    assert {name: (array.dtype.name, array.tolist()) for name, array in tree.items()} == {
        'table': ('float32', [7, 8]),
        'narrow': ('bfloat16', [0, 1, 2, 3]),
        'linear.weight': ('float32', [[0, 1], [2, 3], [4, 5]]),
        'linear.bias': ('float32', [-1, 0, 1]),
    }
    for array in tree.values():
        assert_mapped(array)


def test_other_things_beside_a_program_of_then(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / 'list')
    torch.save(torch.ones(1), tmp_path / 'tensor')
    for weights in (b'', b'no archive', *((tmp_path / name).read_bytes() for name in ('list', 'tensor'))):
        with zipfile.ZipFile(tmp_path / 'x.pt2', 'w') as file:
            file.writestr('serialized_state_dict.pt', weights)
        refusal(tmp_path / 'x.pt2')
    with zipfile.ZipFile(BEFORE_2_8) as file, zipfile.ZipFile(tmp_path / 'x.pt2', 'w', zipfile.ZIP_DEFLATED) as packed:
        for name in file.namelist():
            packed.writestr(name, file.read(name))
    assert 'unzip it' in refusal(tmp_path / 'x.pt2')


def test_exported_programs_with_other_weights(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    path = tmp_path / 'x.pt2'
    torch.export.save(torch.export.export(module, (torch.ones(1, 2),)), path)
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    for old, new in {
        b'"use_pickle": false': b'"use_pickle": true',
        b'"as_int": 3': b'"as_int": 4',
        b'"as_int": 2': b'"as_int":-2',
        b'"dtype": 7': b'"dtype": 9',
        b'weight_0': b'../../x0',
        b'{"as_int": 3}': b'{"as_expr": 3}',
        b'"config"': b'"konfig"',
    }.items():
        with zipfile.ZipFile(path, 'w') as file:
            for name, data in content.items():
                file.writestr(name, data.replace(old, new) if name.endswith('weights_config.json') else data)
        refusal(path)


@pytest.mark.filterwarnings('ignore:TypedStorage')
@pytest.mark.parametrize('whole', [False, True])
def test_torch_package(tmp_path: Path, whole: bool) -> None:
    module = torch.nn.Linear(2, 3)
    with PackageExporter(tmp_path / 'x.pt') as package:
        package.extern('**')
        package.save_pickle('model', 'model.pkl', module if whole else module.state_dict())
    assert "'model/model.pkl'" in refusal(tmp_path / 'x.pt')
    follow(refusal(tmp_path / 'x.pt'), tmp_path)
    assert read(tmp_path / 'weights.pt').tree['weight'].shape == (3, 2)


# ---- folders


def test_a_checkpoint_one_level_down(tmp_path: Path) -> None:
    """As MLflow has it: data/state_dict.pth."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'MLmodel').write_text('')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'data' / 'state_dict.pth')
    assert read(tmp_path).files == (tmp_path / 'data' / 'state_dict.pth',)
    (tmp_path / 'other').mkdir()
    torch.save({'weight': torch.ones(2)}, tmp_path / 'other' / 'x.pt')
    assert "give the one to convert: ['data/state_dict.pth', 'other/x.pt']" in refusal(tmp_path)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_what_accelerate_and_trainers_put_beside_weights(tmp_path: Path, name: str) -> None:
    for other in ('optimizer.bin', 'scheduler.bin', 'sampler.bin', 'dl_state_dict.bin', 'scaler.pt', 'sampler_1.bin'):
        torch.save({}, tmp_path / other)
    for other in ('random_states_0.pkl', 'custom_checkpoint_0.pkl', 'rng_state.pth', 'training_args.bin'):
        (tmp_path / other).write_bytes(pickle.dumps({}))
    assert 'without a checkpoint' in refusal(tmp_path)
    (tmp_path / 'vocabulary.pkl').write_bytes(pickle.dumps({}))  # taken only where there is nothing better
    assert read(tmp_path).files == (tmp_path / 'vocabulary.pkl',)
    torch.save({}, tmp_path / name)
    assert read(tmp_path).files == (tmp_path / name,)


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_a_distributed_checkpoint_one_level_down(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state_dict_saver.save({'model': {'weight': torch.ones(2)}}, checkpoint_id=tmp_path / 'pytorch_model_fsdp_0')
    message = refusal(tmp_path)
    command = message.rpartition('    python -m torch.distributed.checkpoint.format_utils dcp_to_torch ')[2].split()
    assert command == [str(tmp_path / 'pytorch_model_fsdp_0'), 'weights.pt']
    dcp_to_torch_save(command[0], tmp_path / command[1])  # what the command calls
    assert read(tmp_path / 'weights.pt').tree['model']['weight'].tolist() == [1, 1]
