"""from_torch, to_torch and inspect, as a caller meets them. The numbers are in test_parity.py, the wrappers in
test_unwrap.py."""

import pathlib
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vit_pytorch import ViT, deepvit, simple_vit

import convert
from convert import ConversionError, ConversionWarning
from convert.recognition.names import ALIGNMENT, THREADS, aligned_copy
from flax_vit import DeepViT, SimpleViT, from_pretrained, save_pretrained
from parity_tests.support.compilations import compilations

SIMPLE: dict[str, Any] = {'image_size': (12, 8), 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'depth': 2, 'heads': 3}
SIMPLE |= {'mlp_dim': 20, 'dim_head': 7, 'channels': 2}
DEEP: dict[str, Any] = {**SIMPLE, 'image_size': 8, 'pool': 'mean', 'dropout': 0.2, 'emb_dropout': 0.3}
# What the weights of these don't tell.
SIMPLE_FIELDS: dict[str, Any] = {'image_size': (12, 8), 'heads': 3, 'channels': 2}
DEEP_FIELDS: dict[str, Any] = {'channels': 2, 'pool': 'mean', 'dropout': 0.2, 'emb_dropout': 0.3}


@pytest.fixture
def simple() -> torch.nn.Module:
    return simple_vit.SimpleViT(**SIMPLE)


@pytest.fixture
def deep() -> torch.nn.Module:
    return deepvit.DeepViT(**DEEP)


def save(module: torch.nn.Module, path: pathlib.Path) -> pathlib.Path:
    if path.suffix == '.safetensors':
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path)
    return path


@pytest.mark.parametrize('kind', ['state dict', 'arrays', 'module', 'weights.pt', 'weights.pth', 'weights.safetensors'])
@pytest.mark.parametrize('name', ['simple', 'deep'])
def test_every_source_gives_the_same_model(
    kind: str, name: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(name)
    fields = SIMPLE_FIELDS if name == 'simple' else DEEP_FIELDS
    sources = {
        'state dict': module.state_dict,
        'arrays': lambda: {name: tensor.numpy() for name, tensor in module.state_dict().items()},
        'module': lambda: module,
    }
    source = sources[kind]() if kind in sources else save(module, tmp_path / kind)
    model, variables = convert.from_torch(source, **fields)
    assert model == (SimpleViT(**SIMPLE) if name == 'simple' else DeepViT(**DEEP))
    written = convert.to_torch(model, variables)
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()
    }


def test_a_live_module_needs_no_arguments(simple: torch.nn.Module, deep: torch.nn.Module) -> None:
    assert convert.from_torch(simple)[0] == SimpleViT(**SIMPLE)
    assert convert.from_torch(deep)[0] == DeepViT(**DEEP)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_bits_are_preserved(simple: torch.nn.Module, dtype: str) -> None:
    module = simple.to(getattr(torch, dtype))
    model, variables = convert.from_torch(module.state_dict(), **SIMPLE_FIELDS)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {dtype} == {str(jnp.dtype(model.param_dtype))}
    written = convert.to_torch(model, variables)
    for name, tensor in module.state_dict().items():
        assert written[name].dtype == jnp.dtype(dtype)
        assert written[name].tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_float64_is_kept_with_x64_and_said_to_be_rounded_without(simple: torch.nn.Module) -> None:
    state_dict = simple.double().state_dict()
    with pytest.warns(ConversionWarning, match='float64 weights are rounded to float32.*jax_enable_x64'):
        _, variables = convert.from_torch(state_dict, **SIMPLE_FIELDS)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {'float32'}
    with jax.enable_x64(True):
        model, variables = convert.from_torch(state_dict, **SIMPLE_FIELDS)
        written = convert.to_torch(model, variables)
    assert all(written[name].tobytes() == tensor.numpy().tobytes() for name, tensor in state_dict.items())


def test_param_dtype_casts(simple: torch.nn.Module) -> None:
    model, variables = convert.from_torch(simple.state_dict(), **SIMPLE_FIELDS, param_dtype='bfloat16')
    assert model.param_dtype == jnp.bfloat16
    kernel = variables['params']['linear_head']['kernel']
    expected = simple.state_dict()['linear_head.weight'].numpy().astype(ml_dtypes.bfloat16).T
    assert np.array_equal(np.asarray(kernel), expected)
    with pytest.raises(ConversionError, match=r'param_dtype=float64.*jax_enable_x64'):
        convert.from_torch(simple.state_dict(), **SIMPLE_FIELDS, param_dtype='float64')
    for wrong in ('int8', 'nonsense'):
        with pytest.raises(ConversionError, match='dtype'):
            convert.from_torch(simple.state_dict(), **SIMPLE_FIELDS, param_dtype=wrong)


def test_assumptions_are_reported() -> None:
    module = deepvit.DeepViT(image_size=8, patch_size=4, num_classes=5, dim=16, depth=1, heads=1, mlp_dim=20)
    with pytest.warns(ConversionWarning, match="pool='cls', channels=3, dropout=0.0"):
        model, _ = convert.from_torch(module.state_dict())
    assert model.dim_head == 64
    inspection = convert.inspect(module.state_dict())
    assert {name for name, field in inspection.fields.items() if field.how == 'assumed'} == {
        'image_size', 'patch_size', 'channels', 'pool', 'dropout', 'emb_dropout',
    }  # fmt: skip


def test_what_is_not_known_is_asked_for_by_name(simple: torch.nn.Module) -> None:
    with pytest.raises(ConversionError) as caught:
        convert.from_torch(simple.state_dict())
    message = str(caught.value)
    assert re.search('image_size: .*image_size=224', message)
    assert re.search('heads: to_qkv holds 3 x 21, .*heads=3 if dim_head is 7', message)
    assert re.search('channels: a patch holds 32 values.*channels=2 if patch_size is 4', message)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'heads': 4}, r'heads=4 does not divide 21'),
        ({'heads': 3, 'dim_head': 8}, r'heads=3 x dim_head=8 is not 21'),
        ({'dim': 32}, r'dim=32 contradicts the weights: it is 16 by their shapes'),
        ({'depth': 3}, r'depth=3 contradicts the weights'),
        ({'num_classes': 7}, r'num_classes=7 contradicts the weights'),
        ({'channels': 3}, r'channels=3 does not divide 32'),
        ({'patch_size': 5}, r'patch_size=5 .*does not fit'),
        ({'channels': 2, 'patch_size': 2}, r'patch_size=2 with channels=2 does not fit'),
        ({'pool': 'cls'}, r'SimpleViT has no pool; its fields are .*image_size'),
        ({'heads': 0}, r'heads must be a whole number from 1 up, not 0'),
        ({'image_size': '224'}, r'image_size must be a whole number'),
        ({'image_size': 7}, r'multiples'),
        ({'key': 'ema'}, r"no model at key='ema'"),
    ],
)
def test_wrong_fields_are_explained(simple: torch.nn.Module, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert.from_torch(simple.state_dict(), **{**({} if 'heads' in fields else SIMPLE_FIELDS), **fields})


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # the pool of a Transformer, dropouts
def test_one_head_of_the_full_width_is_not_assumed_beside_a_projection() -> None:
    """vit-pytorch's default of 64 a head would be one, and that one has had no to_out since 0.7.4."""
    module = ViT(image_size=8, patch_size=4, num_classes=3, dim=64, depth=1, heads=4, mlp_dim=8, dim_head=16)
    with pytest.raises(ConversionError, match=r'heads: .*has had no to_out since vit-pytorch 0\.7\.4: heads=2 if'):
        convert.from_torch(module.state_dict())
    model: Any
    model, variables = convert.from_torch(module.state_dict(), heads=4)
    assert (model.heads, model.dim_head) == (4, 16)
    assert convert.to_torch(model, variables).keys() == module.state_dict().keys()
    one = ViT(image_size=8, patch_size=4, num_classes=3, dim=64, depth=1, heads=1, mlp_dim=8)
    assert convert.inspect(one.state_dict()).model.heads == 1  # without a projection it is told


def test_deep_vit_says_what_contradicts_its_positions(deep: torch.nn.Module) -> None:
    with pytest.raises(ConversionError, match=r'image_size=12 .*4 patches of 4 x 4, such as images of 8 have'):
        convert.from_torch(deep.state_dict(), **DEEP_FIELDS, image_size=12)
    state_dict = deep.state_dict()
    state_dict['pos_embedding'] = torch.zeros(1, 4, 16)
    with pytest.raises(ConversionError, match='3 is not a square'):
        convert.from_torch(state_dict, **DEEP_FIELDS)


def test_every_difference_is_in_one_message(simple: torch.nn.Module) -> None:
    state_dict = simple.state_dict()
    del state_dict['transformer.layers.1.0.norm.bias'], state_dict['linear_head.bias']
    state_dict['transformer.layers.0.0.to_out.bias'] = torch.zeros(16)
    state_dict['transformer.layers.0.1.net.1.weight'] = torch.zeros(20, 17)
    with pytest.raises(ConversionError) as caught:
        convert.from_torch(state_dict, **SIMPLE_FIELDS)
    message = str(caught.value)
    for line in (
        '- transformer.layers.1.0.norm.bias 16: missing',
        '- linear_head.bias 5: missing',
        '+ transformer.layers.0.0.to_out.bias 16: not part of the model',
        'transformer.layers.0.1.net.1.weight: the shape is 20 x 17, expected 20 x 16',
    ):
        assert line in message


@pytest.mark.parametrize('dtype', [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(simple: torch.nn.Module, dtype: torch.dtype) -> None:
    state_dict = {name: tensor.to(dtype) for name, tensor in simple.state_dict().items()}
    with pytest.raises(ConversionError, match=r'linear_head.weight: (int8|bool|complex64|float8)'):
        convert.from_torch(state_dict, **SIMPLE_FIELDS)


def test_other_sources_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match=r'path, an address, a state dict or a torch.nn.Module, not a int'):
        convert.from_torch(3)
    with pytest.raises(ConversionError, match='There are no tensors here'):
        convert.from_torch({})
    with pytest.raises(FileNotFoundError):
        convert.from_torch(tmp_path / 'missing.pt')


def test_to_torch_refuses_what_no_release_computes_and_foreign_variables(simple: torch.nn.Module) -> None:
    model, variables = convert.from_torch(simple)
    with pytest.raises(ConversionError, match='No release of vit-pytorch computes'):
        convert.to_torch(model.clone(patch_norm=False), variables)
    with pytest.raises(ConversionError, match=r'layout=.D2. does not compute.*S3'):
        convert.to_torch(model, variables, layout='D2')
    with pytest.raises(ConversionError, match='transformer/norm/scale'):
        convert.to_torch(model.clone(depth=1), {'params': {**variables['params'], 'transformer': {}}})
    with pytest.raises(ConversionError, match=r"\{'params': "):
        convert.to_torch(model, variables['params'])


def test_the_parameters_are_copies(simple: torch.nn.Module) -> None:
    state_dict = simple.state_dict()
    _, variables = convert.from_torch(state_dict, **SIMPLE_FIELDS)
    before = np.array(variables['params']['linear_head']['bias'])
    state_dict['linear_head.bias'].fill_(7.0)
    assert np.array_equal(variables['params']['linear_head']['bias'], before)


def test_converting_imports_no_torch() -> None:
    """Both packages import, and a zip checkpoint converts, where there is no torch to import."""
    script = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'vit_pytorch'):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
import convert, flax_vit
fields = {'image_size': 8, 'patch_size': 4, 'heads': 3}
for ending in ('pt', 'safetensors'):
    model, variables = convert.from_torch(f'examples/digits/simple_vit.{ending}', **fields)
print(type(model).__name__, 'torch' in sys.modules)
"""
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stdout == 'SimpleViT False\n', run.stderr


def test_a_class_is_no_model() -> None:
    with pytest.raises(ConversionError, match='This is the class SimpleViT, not a model of it: build one'):
        convert.inspect(simple_vit.SimpleViT)


# ---- fields as people give them, and modules as they are


def test_pairs_and_numpys_numbers(deep: torch.nn.Module) -> None:
    """One number for both sides where a model knows only squares; whole numbers of any kind."""
    state_dict = deep.state_dict()
    plain = convert.inspect(deep).model
    side = plain.patch_size
    for given in (
        {'patch_size': (side, side)},
        {'patch_size': [side, side], 'image_size': (plain.image_size, plain.image_size)},
        {'patch_size': np.int64(side), 'heads': np.int32(plain.heads), 'depth': np.uint8(plain.depth)},
    ):
        found = convert.inspect(state_dict, **given).model
        assert (found.patch_size, found.image_size, found.heads) == (side, plain.image_size, plain.heads)
        assert all(type(value) is int for value in (found.patch_size, found.image_size, found.heads))
    with pytest.raises(ConversionError, match=r'patch_size must be a whole number from 1 up, not \(4, 2\)'):
        convert.inspect(state_dict, patch_size=(4, 2))
    with pytest.raises(ConversionError, match='heads must be a whole number from 1 up, not True'):
        convert.inspect(state_dict, heads=True)


@pytest.mark.parametrize('live', [False, True])
@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_vit_pytorchs_own_way_to_have_no_classes(live: bool) -> None:
    """A head of 0 x dim, whose logits are none: the pooled features come out."""
    for module in (
        simple_vit.SimpleViT(image_size=8, patch_size=4, num_classes=0, dim=16, depth=1, heads=2, mlp_dim=20),
        deepvit.DeepViT(image_size=8, patch_size=4, num_classes=0, dim=16, depth=1, heads=2, mlp_dim=20),
    ):
        source = module if live else module.state_dict()
        inspection = convert.inspect(source, image_size=8)
        assert inspection.fields['num_classes'].value == 0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            model, variables = convert.from_torch(source, image_size=8)
        told = any('_head: ' in str(warning.message) for warning in said)
        assert told == isinstance(module, deepvit.DeepViT)  # whose head has a LayerNorm, too; the rest holds nothing
        assert model.apply(variables, np.zeros((2, 8, 8, 3), np.float32)).shape == (2, 16)  # type: ignore[union-attr]


def test_a_module_without_blocks() -> None:
    module = simple_vit.SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=0, heads=2, mlp_dim=20)
    with pytest.raises(ConversionError, match='has no blocks: with depth=0 it is no transformer'):
        convert.inspect(module)


@pytest.mark.parametrize('part', ['transformer.layers.1.0.dropout', 'transformer.layers.0.1.net.5'])
def test_dropouts_of_several_rates_are_said(deep: Any, part: str) -> None:
    fields = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 2, 'heads': 2, 'mlp_dim': 20}
    module = deepvit.DeepViT(**fields, dropout=0.1)
    assert convert.inspect(module).fields['dropout'].value == 0.1
    module.get_submodule(part).p = 0.5
    name = part.removeprefix('transformer.')
    with pytest.warns(ConversionWarning, match=rf'several rates: 0.1, but {name}: 0.5. Here all have one, 0.1; it'):
        assert convert.inspect(module).fields['dropout'].value == 0.1


@pytest.mark.parametrize('shape', [(300, 70), (1, 7), (7, 1), (0, 3), (129, 128), (), (0,), (31,), (5, 3, 2, 4)])
@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_aligned_copies(shape: tuple[int, ...], dtype: Any) -> None:
    original = np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    with ThreadPoolExecutor(THREADS) as threads:
        for array in (original, original.T):
            copy = aligned_copy(array, threads)
            assert (copy.shape, copy.dtype) == (array.shape, dtype)
            assert copy.flags.c_contiguous
            assert copy.ctypes.data % ALIGNMENT == 0 or not copy.size
            assert copy.tobytes() == array.tobytes()
            assert not np.shares_memory(copy, array)


def test_nothing_is_compiled(tmp_path: pathlib.Path) -> None:
    """A program for each shape would take a tenth of a second for ten of them."""
    odd: dict[str, Any] = {'num_classes': 7, 'dim': 44, 'depth': 2, 'heads': 2, 'mlp_dim': 52}  # of no other test
    module = simple_vit.SimpleViT(image_size=8, patch_size=4, **odd)
    with compilations() as compiled:
        converted = convert.from_torch(
            save(module, tmp_path / 'simple.safetensors'), image_size=8, patch_size=4, heads=2, channels=3
        )
        save_pretrained(tmp_path / 'folder', *converted)
        _, variables = from_pretrained(tmp_path / 'folder')
        assert not compiled
        jax.jit(lambda x: x + 1)(variables['params']['linear_head']['bias'])
        assert len(compiled) == 1  # this is how it is heard


def test_what_is_converted_is_nobody_elses_memory(simple: torch.nn.Module) -> None:
    """What JAX takes over, a step that is given it for its results leaves as it is, too."""
    tensors = simple.state_dict()
    _, variables = convert.from_torch(tensors, **SIMPLE_FIELDS)
    before = jax.tree.map(np.array, variables)
    for tensor in tensors.values():
        tensor.zero_()
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)(variables)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, 2 * other), doubled, before)
