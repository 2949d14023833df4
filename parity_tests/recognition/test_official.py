"""The papers' own checkpoints: what their code and trainers wrote, read, and written back bit for bit."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import convert
from convert import ConversionError
from convert.architectures import architecture_of
from convert.command_line.export import export
from flax_vit import OfficialDeepViT, OfficialSimpleViT, named, save_pretrained
from parity_tests.support.pages import ROOT

OFFICIAL = ROOT / 'parity_tests' / 'golden' / 'official'
TOLD: Any = {
    'dvit-patch': {'image_size': (12, 20), 'transform_scale': False, 'scale_adjustment': 1.0},
    'dvit-S': {'transform_scale': True, 'scale_adjustment': 0.5},
}


def of_dvit_repo(name: str) -> dict[str, np.ndarray]:
    """A state dict."""
    with np.load(OFFICIAL / f'{name}.npz') as file:
        return {key.removeprefix('weights/'): file[key] for key in file if key.startswith('weights/')}


def of_big_vision(prefix: str = '', *, old: bool = False) -> dict[str, np.ndarray]:
    """Arrays by the newest names, or by the old ones."""
    with np.load(OFFICIAL / 'bigvision-gap-old_names.npz') as file:
        arrays = dict(file)
    if not old:
        newest = {'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0', 'LayerNorm_2': 'LayerNorm_1'}
        newest |= {'MlpBlock_3': 'MlpBlock_0'}
        arrays = {
            re.sub('|'.join(newest), lambda found: newest[found[0]], name): array for name, array in arrays.items()
        }
    return {prefix + name: array for name, array in arrays.items()}


def scanned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With one array for all blocks."""
    blocks: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        blocks.setdefault(re.sub(r'(?<=encoderblock)_\d+', '', name), []).append(array)
    return {name: np.stack(parts) if 'encoderblock' in name else parts[0] for name, parts in blocks.items()}


def same(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == array.dtype and np.array_equal(ours[name], array) for name, array in theirs.items()
    )


@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/', 'params/img/'])
@pytest.mark.parametrize('old', [False, True], ids=['new names', 'old names'])
def test_every_npz_of_big_vision(prefix: str, old: bool, tmp_path: Path) -> None:
    """The optimizer has the parameters' names, too, and is left aside."""
    arrays = of_big_vision(prefix, old=old)
    beside = {'opt/state/step': np.array(9), 'chrono/epoch': np.array(2)}
    beside |= {f'opt/0/mu/{name}': array for name, array in of_big_vision().items()}
    np.savez(tmp_path / 'a.npz', **arrays, **beside)  # type: ignore[arg-type]
    found = convert.inspect(tmp_path / 'a.npz')
    model: Any = found.model
    assert (found.layout.id, found.unwrapped.address) == ('G0' if old else 'G1', prefix.strip('/').replace('/', '.'))
    assert any(name.startswith('opt') for name in found.unwrapped.left_aside)
    assert (model.image_size, model.patch_size, model.channels, model.num_classes) == (224, 4, 3, 7)
    assert (model.dim, model.depth, model.heads, model.mlp_dim, model.rep_size) == (24, 3, 3, 40, 24)
    with pytest.warns(convert.ConversionWarning, match='Left aside'):
        model, variables = convert.from_torch(tmp_path / 'a.npz')
    assert same(convert.to_torch(model, variables), of_big_vision())
    assert same(convert.to_torch(model, variables, layout='G0'), of_big_vision(old=True))


def test_npz_of_scanned_layers_in_bfloat16(tmp_path: Path) -> None:
    """numpy has no bfloat16: a file calls it two bytes."""
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in of_big_vision('params/').items()}
    np.savez(tmp_path / 'a.npz', **scanned(half))  # type: ignore[arg-type]
    with np.load(tmp_path / 'a.npz') as file:
        assert file['params/head/bias'].dtype.str == '|V2'
    model, variables = convert.from_torch(tmp_path / 'a.npz')
    assert same(convert.to_torch(model, variables), {n.removeprefix('params/'): array for n, array in half.items()})


def test_a_head_of_big_vision_that_is_missing_or_linear() -> None:
    arrays = of_big_vision()
    linear = {name: array for name, array in arrays.items() if not name.startswith('pre_logits')}
    model: Any = convert.inspect(linear).model
    assert model.rep_size == 0
    body = {name: array for name, array in arrays.items() if not name.startswith('head/')}
    with pytest.raises(ConversionError, match='Only the head, head, is missing: num_classes=0'):
        convert.inspect(body)
    model, variables = convert.from_torch(body, num_classes=0)
    assert model.apply(variables, np.ones((1, 8, 8, 3), np.float32)).shape == (1, 24)
    with pytest.raises(ConversionError, match='patch_size=8 contradicts the weights: it is 4 in them'):
        convert.inspect(arrays, patch_size=8)


@pytest.mark.parametrize('name', ['pos_embedding', 'cls', 'MAPHead_0/probe', 'output_projection/kernel'])
def test_other_models_of_big_vision_are_refused_by_name(name: str) -> None:
    arrays = of_big_vision('params/') | {f'params/{name}': np.zeros((1, 15, 24), np.float32)}
    with pytest.raises(ConversionError, match=r'another ViT of big_vision or Scenic .* another function'):
        convert.inspect(arrays)


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # what is assumed, and counters
@pytest.mark.parametrize('name', TOLD)
def test_state_dicts_of_dvit_repo(name: str) -> None:
    tensors = of_dvit_repo(name)
    model: Any
    model, variables = convert.from_torch(tensors, **TOLD[name])
    assert variables.keys() == {'params', 'batch_stats'}
    counted = {key: tensor for key, tensor in tensors.items() if not key.endswith('num_batches_tracked')}
    assert same(convert.to_torch(model, variables), counted)
    assert model.reattention == ((2, 3) if name == 'dvit-S' else (0, 1, 2))
    assert (model.cnn_stem, model.patch_size) == ((True, 16) if name == 'dvit-S' else (False, 4))
    with pytest.raises(
        ConversionError, match=r'This is an OfficialDeepViT(.|\n)*transform_scale: .*\n.*scale_adjustment: '
    ):
        convert.inspect(tensors, **{key: TOLD[name][key] for key in TOLD[name].keys() & {'image_size'}}).model  # noqa: B018


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 1.6'])
def test_checkpoints_of_timm(tmp_path: Path, zipped: bool) -> None:
    """With the trainer's arguments, which are plain values, and an average under names of its own."""
    tensors = {name: torch.tensor(array) for name, array in of_dvit_repo('dvit-patch').items()}
    average = {name: tensor + 1 for name, tensor in tensors.items()}
    arguments = argparse.Namespace(model='patch', drop_path=0.2, img_size=224)
    checkpoint = {'epoch': 3, 'arch': 'patch', 'state_dict': tensors, 'args': arguments, 'state_dict_ema': average}
    torch.save(checkpoint, tmp_path / 'a.pth.tar', _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ConversionError, match=r"several different models(.|\n)*key='state_dict'(.|\n)*'state_dict_ema'"
    ):
        convert.inspect(tmp_path / 'a.pth.tar', **TOLD['dvit-patch'])
    _, variables = convert.from_torch(tmp_path / 'a.pth.tar', key='state_dict', **TOLD['dvit-patch'])
    _, averaged = convert.from_torch(tmp_path / 'a.pth.tar', key='state_dict_ema', **TOLD['dvit-patch'])
    np.testing.assert_array_equal(averaged['params']['head']['bias'], variables['params']['head']['bias'] + 1)


def test_the_golden_checkpoint_of_timm_is_read() -> None:
    path = OFFICIAL / 'dvit-patch.pth.tar'
    found = convert.inspect(path, key='state_dict', **TOLD['dvit-patch'])
    assert same(found.tensors, {n: a for n, a in of_dvit_repo('dvit-patch').items() if 'num_batches' not in n})
    assert 'state_dict_ema' in found.unwrapped.left_aside


def test_a_vit_of_timm_beside_it_is_none() -> None:
    """It has the names of blocks that don't re-attend."""
    deep = of_dvit_repo('dvit-patch')
    plain = {name: tensor for name, tensor in deep.items() if 'reatten' not in name and 'var_norm' not in name}
    found = convert.inspect({'deep': deep, 'plain': plain}, **TOLD['dvit-patch'])
    assert (found.unwrapped.address, found.unwrapped.left_aside['plain']) == ('deep', '44 tensors')


def blank(name: str) -> dict[str, Any]:
    """The names and shapes of a registered model's checkpoint; all zeros are one."""
    model = named(name)
    architecture = architecture_of(model)
    layout = architecture.layouts_of(model)[0]
    with torch.device('meta'):
        module = architecture.torch_module(model, {})
    return {
        layout.from_today(key): np.broadcast_to(np.zeros((), np.float32), tuple(tensor.shape))
        for key, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize(('name', 'parameters', 'entries'), [
    ('deepvit_patch16_224_re_attn_16b', 24_426_664, 312),
    ('deepvit_patch16_224_re_attn_24b', 36_261_448, 464),
    ('deepvit_patch16_224_re_attn_32b', 48_096_232, 616),
    ('deepvit_S', 27_312_632, 247),
    ('deepvit_L', 58_883_708, 488),
    ('deepvit_L_384', 59_043_308, 488),
])  # fmt: skip
def test_the_registered_models_are_told_by_their_sizes(name: str, parameters: int, entries: int) -> None:
    tensors = blank(name)
    assert len(tensors) == entries
    trained = [key for key in tensors if 'running' not in key and 'num_batches' not in key]
    assert sum(tensors[key].size for key in trained) == parameters
    found = convert.inspect(tensors)
    assert found.model == named(name)
    assert not found.assumptions
    assert name in found.fields['scale_adjustment'].why


def test_the_name_of_a_registered_model_is_heard() -> None:
    """It tells what the sizes don't: here they are those of none."""
    tensors = of_dvit_repo('dvit-S')
    for said in ({'arch': 'deepvit_S'}, {'args': argparse.Namespace(model='deepvit_S')}):
        with pytest.raises(ConversionError, match=r' (arch|args\.model) says heads=12, but by their shapes it is 3\n'):
            convert.inspect({'state_dict': tensors, **said})


def test_the_published_simple_vit_has_its_size() -> None:
    from flax_vit.parameters import variable_shapes

    shapes = variable_shapes(named('official_simple_vit_s16'))
    assert sum(int(np.prod(shape.shape)) for shape in shapes.values()) == 22_122_472
    assert len(shapes) == 200
    linear = variable_shapes(named('official_simple_vit_s16', rep_size=0))
    assert sum(int(np.prod(shape.shape)) for shape in linear.values()) == 21_974_632


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')
def test_export_writes_what_their_code_reads(tmp_path: Path) -> None:
    save_pretrained(tmp_path / 'simple', *convert.from_torch(of_big_vision()))
    export(tmp_path / 'simple', tmp_path / 'a.npz')
    with np.load(tmp_path / 'a.npz') as file:
        assert same(dict(file), of_big_vision())
    with pytest.raises(ConversionError, match=r'should end in \.npz: what reads an OfficialSimpleViT'):
        export(tmp_path / 'simple', tmp_path / 'a.pt')
    tensors = of_dvit_repo('dvit-S')
    model, variables = convert.from_torch(tensors, **TOLD['dvit-S'])
    save_pretrained(tmp_path / 'deep', model, variables)
    export(tmp_path / 'deep', tmp_path / 'a.pt')
    module = architecture_of(model).torch_class(model)
    assert module.__module__ == 'convert.references.deep_vit'
    written = torch.load(tmp_path / 'a.pt', weights_only=True)
    assert same({key: tensor.numpy() for key, tensor in written.items()}, {
        key: tensor for key, tensor in tensors.items() if not key.endswith('num_batches_tracked')
    })  # fmt: skip
    assert (
        convert.inspect(tmp_path / 'a.pt', **TOLD['dvit-S']).model == convert.inspect(tensors, **TOLD['dvit-S']).model
    )


@pytest.mark.usefixtures('unchecked')
def test_wrong_fields_are_told() -> None:
    usual: Any = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 12, 'depth': 2, 'heads': 3, 'mlp_dim': 5}
    for wrong, values, message in (
        ('reattention', [(1, 0), (0.0,), 'all'], 'must be the numbers of blocks, from 0 to 1 in order'),
        ('scale_adjustment', [-0.5, 'x', math.inf, True], 'must be a number above 0'),
        ('dim', [13], 'must be a multiple of heads=3'),
        ('drop_path', [2.0], 'must be a rate from 0 to 1'),
        ('cnn_stem', ['no'], 'must be True or False'),
    ):
        for value in values:
            with pytest.raises(ValueError, match=message):
                OfficialDeepViT(**usual | {wrong: value})
    with pytest.raises(ValueError, match='with cnn_stem, patch_size must be even'):
        OfficialDeepViT(**usual | {'patch_size': 1, 'cnn_stem': True})
    with pytest.raises(ValueError, match='multiple of 4 for the sincos table, and of heads=3'):
        OfficialSimpleViT(**usual | {'dim': 16})
