"""Whatever trainers wrap a model in: it is found, what is left aside is said, and nothing is guessed."""

import argparse
import io
import pathlib
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax.core import FrozenDict
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from vit_pytorch import MAE, Dino, ViT, deepvit, simple_flash_attn_vit, simple_vit, simple_vit_with_patch_dropout
from vit_pytorch.accept_video_wrapper import AcceptVideoWrapper
from vit_pytorch.distill import DistillableViT, DistillWrapper
from vit_pytorch.extractor import Extractor
from vit_pytorch.lejepa import LeJEPA
from vit_pytorch.recorder import Recorder
from vit_pytorch.simmim import SimMIM
from vit_pytorch.simple_vit_with_value_residual import SimpleViT as WithValueResidual

import convert
from convert import ConversionError, ConversionWarning, inspect
from convert.architectures import layouts_of_all
from convert.recognition.unwrap import MOST_PLACES, unwrap
from parity_tests.golden.make import port_table
from parity_tests.support.fuzz import steps
from parity_tests.support.reference import FLOAT64_BOUND, channels_first, perturbed, relative_error, to_numpy

FIELDS: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'depth': 2, 'heads': 3}
FIELDS |= {'mlp_dim': 20, 'dim_head': 7}
MODELS: dict[str, type[torch.nn.Module]] = {
    'ViT': ViT,
    'SimpleViT': simple_vit.SimpleViT,
    'DeepViT': deepvit.DeepViT,
}
every_model = pytest.mark.parametrize('model', MODELS)
Tensors = dict[str, torch.Tensor]


def module(model: str = 'SimpleViT', seed: int = 0) -> torch.nn.Module:
    return perturbed(MODELS[model](**FIELDS), seed)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def assert_same(tensors: Any, truth: Tensors) -> None:
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: to_numpy(tensor).tobytes() for name, tensor in truth.items()
    }


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        inspect(source, **options)
    return str(caught.value)


# ---- wrappers that are modules


def dino(inner: torch.nn.Module) -> Any:
    still = torch.nn.Identity()
    return Dino(
        inner, image_size=8, hidden_layer='to_latent', projection_hidden_size=6, projection_layers=2, num_classes_K=7,
        augment_fn=still, augment_fn2=still,
    )  # fmt: skip


def lejepa(inner: torch.nn.Module) -> torch.nn.Module:
    still = torch.nn.Identity()
    return LeJEPA(
        inner, image_size=8, hidden_layer='to_latent', projection_hidden_size=6, projection_layers=2, num_classes_K=7,
        augment_fn=still, augment_fn2=still,
    )  # fmt: skip


def mae(inner: torch.nn.Module) -> torch.nn.Module:
    """Its decoder, as wide as the encoder, itself looks like a Transformer of vit-pytorch."""
    return MAE(encoder=inner, decoder_dim=16, masking_ratio=0.5, decoder_depth=2)


def simmim(inner: torch.nn.Module) -> torch.nn.Module:
    return SimMIM(encoder=inner)


def video(inner: torch.nn.Module) -> torch.nn.Module:
    return AcceptVideoWrapper(inner, add_time_pos_emb=True, dim_emb=16, time_seq_len=4, output_pos_add_pos_emb=0)


parallel, compiled = torch.nn.DataParallel, torch.compile
# Modules that compute what the one inside computes, and where it is in their state dicts.
TRANSPARENT: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    'DataParallel': (parallel, 'module', []),
    'compiled': (compiled, '_orig_mod', []),
    'compiled DataParallel': (lambda inner: compiled(parallel(inner)), '_orig_mod.module', []),
    'DataParallel of compiled': (lambda inner: parallel(compiled(inner)), 'module', []),
    'again and again': (lambda inner: parallel(compiled(parallel(parallel(inner)))), 'module.module.module', []),
    'AveragedModel': (AveragedModel, 'module', ['n_averaged']),
    'AveragedModel of DataParallel': (lambda inner: AveragedModel(parallel(inner)), 'module.module', ['n_averaged']),
}
# Modules that compute something else around it.
AROUND: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    'MAE': (mae, 'encoder', ['mask_token', 'patch_to_emb', 'decoder', 'decoder_pos_emb', 'to_pixels']),
    'SimMIM': (simmim, 'encoder', ['mask_token', 'patch_to_emb', 'to_pixels']),
    'Dino': (dino, 'net', ['teacher_centers', 'last_teacher_centers', 'student_encoder', 'teacher_encoder']),
    'LeJEPA': (lejepa, 'net', ['encoder']),
    'Extractor': (Extractor, 'vit', []),
    'Recorder': (Recorder, 'vit', []),
    'AcceptVideoWrapper': (video, 'image_net', ['pos_emb']),
    'a part of a Sequential': (lambda inner: torch.nn.Sequential(torch.nn.BatchNorm2d(3), inner), '1', ['0']),
    'Extractor of DataParallel': (lambda inner: Extractor(parallel(inner)), 'vit.module', []),
}


@every_model
@pytest.mark.parametrize('wrapper', TRANSPARENT | AROUND)
def test_the_state_dict_of_a_wrapper(model: str, wrapper: str, tmp_path: Path) -> None:
    wrap, address, left_aside = (TRANSPARENT | AROUND)[wrapper]
    inner = module(model)
    torch.save(wrap(inner).state_dict(), tmp_path / 'weights.pt')
    inspection = inspect(tmp_path / 'weights.pt')
    assert inspection.unwrapped.address == address
    assert list(inspection.unwrapped.left_aside) == left_aside
    assert_same(inspection.tensors, inner.state_dict())


@every_model
@pytest.mark.parametrize('wrapper', TRANSPARENT)
def test_a_live_wrapper_that_computes_the_same(model: str, wrapper: str) -> None:
    wrap, *_ = TRANSPARENT[wrapper]
    inner = module(model)
    inspection = inspect(wrap(inner))
    assert inspection.model == inspect(inner).model
    assert_same(inspection.tensors, inner.state_dict())


def test_a_distilled_vit_is_the_student(float64: None) -> None:
    """Its state dict inside DistillWrapper's, and the live module itself."""
    student = perturbed(DistillableViT(**FIELDS)).double()
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    inspection = inspect(DistillWrapper(teacher=teacher, student=student).state_dict())
    assert inspection.unwrapped.address == 'student'
    assert list(inspection.unwrapped.left_aside) == ['distillation_token', 'teacher', 'distill_mlp']
    assert_same(inspection.tensors, student.state_dict())
    model, variables = convert.from_torch(student)
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    assert relative_error(model.apply(variables, images), to_numpy(student(channels_first(images)))) <= FLOAT64_BOUND


@pytest.mark.parametrize('wrapper', AROUND)
def test_a_live_wrapper_that_computes_something_else_names_what_it_holds(wrapper: str) -> None:
    wrap, address, _ = AROUND[wrapper]
    wrapped = wrap(module())
    message = refusal(wrapped)
    assert message.startswith(f'This module is a {type(wrapped).__module__}.{type(wrapped).__qualname__}, which is')
    assert re.search(rf'It holds .*pass .*: module\.get_submodule\({address.removesuffix(".module")!r}\)', message)


def test_a_part_of_the_model_that_is_wrapped_for_itself() -> None:
    inner: Any = module()
    truth = inner.state_dict()
    inner.transformer = compiled(inner.transformer)
    for block in inner.transformer.layers:
        block[0] = compiled(block[0])
    names = [name for name in inner.state_dict() if '._orig_mod.' in name]
    assert names
    inspection = inspect(prefixed('module.', inner.state_dict()))
    assert not inspection.unwrapped.left_aside
    assert_same(inspection.tensors, truth)
    wrapped = inner.transformer
    assert_same(inspect(inner).tensors, truth)
    assert inner.transformer is wrapped  # it is left as it was


@pytest.mark.parametrize('wrap', [compiled, parallel, checkpoint_wrapper])
def test_parts_of_a_live_module_that_are_wrapped(wrap: Any) -> None:
    inner: Any = module('DeepViT')
    truth = inner.state_dict()
    plain = inspect(inner).fields
    for block in inner.transformer.layers:
        block[0], block[1].net[1] = wrap(block[0]), wrap(block[1].net[1])
    inner.to_patch_embedding, inner.transformer = wrap(inner.to_patch_embedding), wrap(inner.transformer)
    inspection = inspect(wrap(inner))
    assert_same(inspection.tensors, truth)
    assert inspection.fields == plain
    inner.transformer.get_submodule(next(iter(inner.transformer._modules))).layers[0][0] = torch.nn.Identity()
    assert 'another function' in refusal(inner)


def test_a_fully_sharded_module(tmp_path: Path) -> None:
    """One process holds all of each tensor: they are gathered. In a file they cannot be, and the advice is followed."""
    inner: Any = module()
    truth = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    torch.distributed.init_process_group('gloo', store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        for part in (*(block[0] for block in inner.transformer.layers), inner):
            fully_shard(part, mesh=mesh)
        for source in (inner, inner.state_dict()):
            assert_same(inspect(source).tensors, truth)
        state_dict = inner.state_dict()
        torch.save({'model': state_dict}, tmp_path / 'x.pt')
        message = refusal(tmp_path / 'x.pt')
        assert message.startswith('model.')
        assert 'lies on several processes' in message
        assert_same(inspect(eval(message.split('\n')[1], {'state_dict': state_dict})).tensors, truth)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings('ignore:.*(quantize|Quant|Sparse|sparse)')
@pytest.mark.parametrize(
    ('kind', 'change'),
    [
        ('sparse', lambda tensor: tensor.to_sparse()),
        ('sparse', lambda tensor: tensor.to_sparse_csr()),
        ('quantised', lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
        ('meta', lambda tensor: tensor.to('meta')),
    ],
)
def test_tensors_without_plain_numbers_are_named(kind: str, change: Any, tmp_path: Path) -> None:
    truth = module().state_dict()
    state_dict = truth | {'linear_head.weight': change(truth['linear_head.weight'])}
    torch.save({'model': prefixed('module.', state_dict)}, tmp_path / 'x.pt')
    in_file, in_memory = refusal(tmp_path / 'x.pt'), refusal(state_dict)
    assert in_file.startswith('model.module.linear_head.weight is a ' + kind.replace('meta', 'tensor of the meta'))
    assert in_memory.startswith('linear_head.weight: a ' + kind.replace('meta', 'tensor of the meta'))
    if kind != 'meta':
        plain = eval(in_file.split('\n')[1], {'state_dict': state_dict})
        assert inspect(plain).parameters == inspect(truth).parameters
    else:
        call = re.search(r'load_state_dict\(.*?\)', in_file)
        assert call
        with torch.device('meta'):
            empty = module()
        eval(f'empty.{call[0]}', {'empty': empty, 'state_dict': truth})
        assert_same(inspect(empty.state_dict()).tensors, truth)


def test_a_file_inside_of_a_file_and_a_module_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = module()
    content = io.BytesIO()
    torch.save(inner.state_dict(), content)
    trees: list[tuple[Any, str]] = [
        ({'run': {'model': content.getvalue()}}, 'inner.pt'),
        ({'run': {'model': inner}}, 'weights.pt'),
    ]
    trees += [({'run': [0, {'a.b': tree['run']['model']}]}, made) for tree, made in trees]
    for tree, made in trees:
        Path(made).unlink(missing_ok=True)
        torch.save(tree, 'x.pt')
        lines = [line.strip() for line in refusal('x.pt').split('\n') if line.startswith('    ')]
        exec('\n'.join(lines), {'torch': torch, 'pathlib': pathlib})
        assert_same(inspect(made).tensors, inner.state_dict())


def test_plain_pickles_and_big_endian_arrays(tmp_path: Path) -> None:
    truth = module('DeepViT').state_dict()
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps({'model': truth}))
    assert_same(inspect(tmp_path / 'x.pkl').tensors, truth)
    big = {name: tensor.numpy().astype('>f4') for name, tensor in truth.items()}
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(big))
    for source in (big, tmp_path / 'x.pkl'):
        assert_same(inspect(source).tensors, truth)
        _, variables = convert.from_torch(source, pool='cls', dropout=0.0, emb_dropout=0.0, patch_size=4, channels=3)
        assert variables['params']['cls_token'].dtype == np.float32


# ---- a table beside the parameters


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('size', [(8, 8), (8, 20), (20, 8), (4, 4), (4, 24), (24, 4)])
def test_a_sincos_table_tells_the_image_size(size: tuple[int, int], dtype: torch.dtype) -> None:
    inner = simple_vit.SimpleViT(**FIELDS | {'image_size': size}).to(dtype)
    table: Any = inner.pos_embedding
    for shown in (table.to(dtype), table.to(dtype)[None]):
        inspection = inspect(prefixed('module.', inner.state_dict() | {'pos_embedding': shown}))
        assert inspection.fields['image_size'].value == (size if size[0] != size[1] else size[0])
        assert inspection.fields['image_size'].how == 'assumed'  # as the patch size, which is a factor of it
        assert (
            inspect(inner.state_dict() | {'pos_embedding': shown}, patch_size=4).fields['image_size'].how == 'inferred'
        )
        assert not inspection.unwrapped.left_aside
        assert 'pos_embedding' not in inspection.tensors


def test_another_table_is_another_function() -> None:
    inner: Any = module()
    state_dict, table = inner.state_dict(), inner.pos_embedding
    for wrong in (table + 0.01, table[:, :8], table[:3], table.T, table * 0, table[:0], table * torch.nan):
        assert 'not the sincos table of SimpleViT' in refusal(state_dict | {'pos_embedding': wrong})
    message = refusal(state_dict | {'pos_embedding': table}, image_size=12)
    assert (
        'image_size=12 contradicts the weights: pos_embedding is the table of 2 x 2 patches of 4, which is 8' in message
    )
    assert inspect(state_dict | {'pos_embedding': table}, image_size=8).fields['image_size'].how == 'given'


# ---- the work


def many_places(count: int) -> dict[str, np.ndarray]:
    """Names that might be parameters under as many beginnings as are tried, each with most of the others inside."""
    empty = np.zeros((0,), np.float32)
    nested = {f'{"x." * depth}linear_head.weight': empty for depth in range(70)}
    deep = 'x.' * 70
    return nested | {f'{deep}{number}.linear_head.bias.{number}': empty for number in range(count)}


def test_the_work_grows_with_the_file_and_no_more() -> None:
    """Each place was once held against the layouts with all the names in it."""
    few, many = many_places(500), many_places(2000)
    unwrap_or_refuse(few)  # what is made once is made
    small, large = (steps(partial(unwrap_or_refuse, tree)) for tree in (few, many))
    assert large < 4.2 * small
    layouts = len(layouts_of_all()) + len(layouts_of_all('transformer'))
    assert large < 350 * layouts * len(many)  # some 250; with every place tried, 2800


def unwrap_or_refuse(tree: Any) -> None:
    with pytest.raises(ConversionError):
        unwrap(tree)


def test_a_trained_dino_asks_which_weights() -> None:
    inner = module()
    wrapped = dino(inner)
    perturbed(inner, seed=1)
    state_dict = wrapped.state_dict()
    message = refusal(state_dict)
    assert message.startswith('There are several different models here; choose one.')
    size = f'30 tensors, {sum(tensor.nbytes for tensor in inner.state_dict().values()):,} bytes'
    for key in ('net', 'teacher_encoder.net'):
        assert f'key={key!r}: SimpleViT of vit-pytorch 1.4.1 and later; {size}' in message
    assert 'student_encoder' not in message  # the same tensors as net
    for key in ('net', 'student_encoder', 'student_encoder.net'):
        assert_same(inspect(state_dict, key=key).tensors, inner.state_dict())
    for key in ('teacher_encoder', 'teacher_encoder.net'):
        assert_same(inspect(state_dict, key=key).tensors, wrapped.teacher_encoder.net.state_dict())


# ---- what trainers save


def optimizer_state(inner: torch.nn.Module) -> dict[str, Any]:
    """Of an optimiser that has made a step: its averages have the parameters' shapes."""
    optimizer = torch.optim.AdamW(inner.parameters())
    inner(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def lightning(inner: torch.nn.Module) -> dict[str, Any]:
    return {
        'epoch': 3,
        'global_step': 12,
        'pytorch-lightning_version': '2.5.0',
        'state_dict': prefixed('model.', dict(inner.state_dict())) | {'criterion.weight': torch.ones(5)},
        'loops': {'fit_loop': {'state_dict': {}, 'epoch_progress': {'total': {'ready': 4}}}},
        'callbacks': {"ModelCheckpoint{'monitor': 'val.acc'}": {'best_model_score': torch.tensor(0.5)}},
        'optimizer_states': [optimizer_state(inner)],
        'lr_schedulers': [{'base_lrs': [1e-3], 'last_epoch': 3}],
        'hparams_name': 'kwargs',
        'hyper_parameters': {'lr': 1e-3, 'model': {'dim': 16}},
    }


def timm(inner: torch.nn.Module) -> dict[str, Any]:
    return {
        'epoch': 3,
        'arch': 'simple_vit',
        'state_dict': prefixed('module.', dict(inner.state_dict())),
        'optimizer': optimizer_state(inner),
        'args': argparse.Namespace(lr=0.1, model='simple_vit'),
        'amp_scaler': {'scale': 65536.0, 'growth_factor': 2.0},
        'metric': 71.5,
    }


TRAINERS: dict[str, tuple[Callable[[torch.nn.Module], dict[Any, Any]], str, dict[str, str]]] = {
    'Lightning': (
        lightning,
        'state_dict.model',
        {
            'epoch': '3', 'global_step': '12', 'pytorch-lightning_version': "'2.5.0'",
            'state_dict.criterion': '1 tensor', 'loops': '4', 'callbacks': '1 tensor', 'optimizer_states': '',
            'lr_schedulers': '2 values',
            'hparams_name': "'kwargs'", 'hyper_parameters': '2 values',
        },
    ),
    'timm': (
        timm,
        'state_dict.module',
        {
            'epoch': '3', 'arch': "'simple_vit'", 'optimizer': '', 'args': '2 values',
            'amp_scaler': '2 values', 'metric': '71.5',
        },
    ),
    'kentaroy47': (
        lambda inner: {'net': inner.state_dict(), 'acc': 80.1, 'epoch': 7},
        'net',
        {'acc': '80.1', 'epoch': '7'},
    ),
    'LKCA': (
        lambda inner: {'epoch': 7, 'model_state_dict': inner.state_dict(), 'loss': torch.tensor(0.5)},
        'model_state_dict',
        {'epoch': '7', 'loss': '1 tensor'},
    ),
    'lists, numbers': (lambda inner: {3: [None, {'a.b': inner.state_dict()}]}, '3.1.a.b', {'3.0': 'None'}),
    'netD in DDP': (
        lambda inner: {'best': prefixed('module.netD.', inner.state_dict()), 'best epoch': 9},
        'best.module.netD',
        {'best epoch': '9'},
    ),
    'counters of a profiler': (
        lambda inner: {**inner.state_dict(), 'transformer.total_ops': torch.zeros(1), 'total_params': torch.zeros(1)},
        '',
        {'total_ops': '1 tensor', 'total_params': '1 tensor'},
    ),
}  # fmt: skip


@every_model
@pytest.mark.parametrize('trainer', TRAINERS)
def test_a_trainers_checkpoint(model: str, trainer: str, tmp_path: Path) -> None:
    save, address, left_aside = TRAINERS[trainer]
    inner = module(model)
    path = tmp_path / 'last epoch: 12.pth.tar'
    torch.save(save(inner), path)
    inspection = inspect(path)
    assert inspection.unwrapped.address == address
    assert_same(inspection.tensors, inner.state_dict())
    found = dict(inspection.unwrapped.left_aside)
    for optimizer in found.keys() & {'optimizer', 'optimizer_states'}:
        moments = 3 * len(inner.state_dict())  # with the count of steps
        assert found.pop(optimizer).startswith(f'{moments} tensors and ')
    assert found == {group: what for group, what in left_aside.items() if what}
    assert inspect(path, key=address).unwrapped.address == address


def test_what_is_left_aside_is_a_warning() -> None:
    checkpoint = {'net': module().state_dict(), 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}}}
    told: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'heads': 3}
    with pytest.warns(ConversionWarning, match=r'^Left aside, as no part of the model: optimizer: 1 tensor\.$'):
        convert.from_torch(checkpoint, **told)


# ---- several models in one file


def two_models() -> tuple[Tensors, Tensors]:
    return dict(module().state_dict()), dict(module(seed=1).state_dict())


@pytest.mark.parametrize(
    ('raw', 'average'),
    [('state_dict', 'state_dict_ema'), ('model', 'model_ema'), ('last', 'best'), ('model', 'model.ema'), ('x', 'x:2')],
)
def test_averaged_and_raw_weights_are_never_mixed(raw: str, average: str) -> None:
    one, other = two_models()
    checkpoint = {raw: one, average: prefixed('module.', other), 'epoch': 1}
    message = refusal(checkpoint)
    assert f'key={raw!r}: SimpleViT' in message
    assert f"key='{average}.module': SimpleViT" in message
    assert_same(inspect(checkpoint, key=raw).tensors, one)
    chosen = inspect(checkpoint, key=average)
    assert_same(chosen.tensors, other)
    assert chosen.unwrapped.left_aside == {raw: '30 tensors', 'epoch': '1'}


def test_mappings_that_make_what_they_hold_when_they_are_asked() -> None:
    """Flax's, for one: what is made and thrown away gives its id to the next."""
    models = {name: module(seed=seed).state_dict() for seed, name in enumerate('abc')}
    for name, tensors in models.items():
        assert_same(inspect(FrozenDict(models), key=name).tensors, tensors)


def test_averaged_weights_among_the_names_of_the_raw_ones() -> None:
    """The longer names are a complete model; the others are one as well, and not just what is left over."""
    one, other = two_models()
    state_dict = one | prefixed('ema.module.', other)
    message = refusal(state_dict)
    assert "key='': SimpleViT" in message
    assert "key='ema.module': SimpleViT" in message
    raw = inspect(state_dict, key='')
    assert_same(raw.tensors, one)
    assert raw.unwrapped.left_aside == {'ema': '30 tensors'}
    assert_same(inspect(state_dict, key='ema').tensors, other)


def test_equal_models_are_one() -> None:
    one, _ = two_models()
    checkpoint = {'a': {'deep': one}, 'best': {name: tensor.clone() for name, tensor in one.items()}}
    inspection = inspect(checkpoint)
    assert inspection.unwrapped.address == 'best'
    assert inspection.unwrapped.left_aside == {'a': '30 tensors'}
    assert inspect(checkpoint, key='a').unwrapped.address == 'a.deep'


@pytest.mark.parametrize('change', ['a bit', 'the sign of zero', 'a dtype', 'a name'])
def test_models_that_differ_in_the_least_are_two(change: str) -> None:
    one, _ = two_models()
    other = {name: tensor.clone() for name, tensor in one.items()}
    if change == 'a bit':
        other['linear_head.bias'].view(torch.int32)[0] ^= 1
    elif change == 'the sign of zero':
        one['linear_head.bias'][0], other['linear_head.bias'][0] = 0.0, -0.0
    elif change == 'a dtype':
        one['linear_head.bias'] = one['linear_head.bias'].half()
        other['linear_head.bias'] = one['linear_head.bias'].view(torch.bfloat16)
    else:
        other = dict(perturbed(simple_flash_attn_vit.SimpleViT(**FIELDS)).state_dict())
    assert 'several different models' in refusal({'one': one, 'other': other})


def test_a_function_with_less_weights_is_another_model() -> None:
    """Without their heads S1 has all that S3 has, but the last norm."""
    one, _ = two_models()
    other = {name: tensor for name, tensor in one.items() if not name.startswith('transformer.norm')}
    message = refusal({'one': one, 'other': other}, num_classes=0)
    assert "key='one': SimpleViT of vit-pytorch 1.4.1 and later" in message
    assert "key='other': SimpleViT of vit-pytorch 1.0.0 to 1.2.9" in message


def test_not_a_number_equals_itself() -> None:
    one, _ = two_models()
    one['linear_head.bias'][0] = float('nan')
    assert inspect({'one': one, 'other': dict(one)}).unwrapped.address == 'one'


def test_a_key_that_leads_nowhere_is_answered_with_those_that_do() -> None:
    one, other = two_models()
    message = refusal({'state_dict': one, 'state_dict_ema': other}, key='state')
    assert message.startswith("There is no model at key='state'. Models here:\n  key='state_dict': SimpleViT")
    assert "key='state_dict_ema'" in message
    assert refusal({'a': torch.ones(2)}, key='b') == "There is no model at key='b'. Its tensors are 'a'."


def test_a_key_with_a_broken_model_says_how_it_is_broken() -> None:
    one, other = two_models()
    del other['linear_head.bias']
    message = refusal({'one': one, 'other': other}, key='other')
    assert "at 'other'; the difference:\n  - linear_head.bias 5: missing" in message
    assert_same(inspect({'one': one, 'other': other}).tensors, one)


def test_a_key_finds_one_of_very_many_models() -> None:
    zoo = {f'model {number}': arrays(module(seed=number).state_dict()) for number in range(MOST_PLACES + 6)}
    last = list(zoo)[-1]
    assert unwrap(zoo, key=last).tensors.keys() == zoo[last].keys()
    assert unwrap(zoo, key=last).tensors['linear_head.bias'] is zoo[last]['linear_head.bias']


# ---- containers


def test_containers_that_hold_themselves() -> None:
    tensors = arrays(module().state_dict())
    tree: dict[str, Any] = {'model': tensors, 'more': []}
    tree['more'] += [tree, tree['more']]
    tree['self'] = tree
    found = unwrap(tree)
    assert (found.address, found.left_aside) == ('model', {})
    assert found.tensors == tensors
    assert_same(inspect(tree).tensors, module().state_dict())


def test_shared_containers_are_found_by_every_address() -> None:
    tensors = arrays(module().state_dict())
    tree = {'last': tensors, 'best': tensors}
    assert unwrap(tree).left_aside == {'best': '30 tensors'}
    assert (unwrap(tree, key='best').address, unwrap(tree, key='best').left_aside) == ('best', {'last': '30 tensors'})


def test_two_tensors_of_one_name_are_an_error() -> None:
    tensors = arrays(module().state_dict())
    twice = {**tensors, 'transformer._orig_mod.norm.bias': tensors['transformer.norm.bias'] + 1}
    with pytest.raises(ConversionError, match=r"Two tensors have the name 'transformer\.norm\.bias'"):
        unwrap(twice)


# ---- incomplete, replaced, more than a model


@every_model
def test_a_head_that_was_cut_off(model: str, float64: None) -> None:
    """The converter says what helps, and the pooled features come out."""
    inner: Any = module(model).double()
    inner.pos_embedding = port_table(h=2, w=2, dim=16) if model == 'SimpleViT' else inner.pos_embedding
    head = 'linear_head' if model == 'SimpleViT' else 'mlp_head'
    body = {name: tensor for name, tensor in inner.state_dict().items() if not name.startswith(head)}
    message = refusal(body, image_size=8)
    assert f'- {head}.' in message
    assert message.endswith(
        f'Only the head, {head}, is missing: num_classes=0 converts the rest, to give the pooled features.'
    )
    setattr(inner, head, torch.nn.Identity())
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    truth = inner(channels_first(images)).detach().numpy()
    for source in (body, inner):
        told: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'channels': 3, 'heads': 3, 'num_classes': 0}
        told |= {} if model == 'SimpleViT' else {'pool': 'cls', 'dropout': 0.0, 'emb_dropout': 0.0}
        port, variables = convert.from_torch(source, **told)
        assert relative_error(jax.jit(port.apply)(variables, images), truth) <= FLOAT64_BOUND


def linear_probe(inner: Any) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Dropout(), torch.nn.Linear(16, 3))


@every_model
@pytest.mark.parametrize('new', [linear_probe, lambda _: torch.nn.Linear(16, 3, bias=False)], ids=['probe', 'no bias'])
def test_a_head_that_was_replaced(model: str, new: Any) -> None:
    inner: Any = module(model)
    head = 'linear_head' if model == 'SimpleViT' else 'mlp_head'
    setattr(inner, head, new(inner))
    message = refusal(inner.state_dict())
    assert message.endswith(
        f'Only the head, {head}, is another one: num_classes=0 leaves it out and converts the rest, to give the pooled '
        'features.'
    )
    assert 'the rest' in refusal(inner)
    inspection = inspect(inner.state_dict(), num_classes=0)
    assert inspection.unwrapped.left_aside.keys() == {head}
    body = {name: tensor for name, tensor in inner.state_dict().items() if not name.startswith(head)}
    assert_same(inspection.tensors, body)
    setattr(inner, head, torch.nn.Identity())
    assert_same(inspect(inner).tensors, body)


@every_model
def test_a_new_head_beside_the_model(model: str) -> None:
    inner = module(model)
    head = 'linear_head' if model == 'SimpleViT' else 'mlp_head'
    beside = {'fc.weight': torch.ones(3, 16), 'fc.bias': torch.ones(3)}
    message = refusal(inner.state_dict() | beside)
    assert '+ fc.weight 3 x 16: not part of the model' in message
    assert 'The whole model is here, with unexpected keys: fc. If they are no part of what it computes' in message
    assert message.endswith('remove them from the state dict and convert the rest.')
    body = {name: tensor for name, tensor in inner.state_dict().items() if not name.startswith(head)}
    message = refusal(body | beside)
    assert message.endswith(f'{head} is missing or another one: give num_classes=0 as well, for the pooled features.')
    assert '+ fc.weight' in refusal(body | beside, num_classes=0)
    assert_same(inspect(body, num_classes=0).tensors, body)


def test_a_transformer_in_a_model_of_ones_own() -> None:
    """As Clay has it: an encoder of its own round vit-pytorch's Transformer."""
    transformer = {name: tensor for name, tensor in module().state_dict().items() if name.startswith('transformer.')}
    clay = transformer | {'cls_token': torch.ones(1, 1, 16), 'patch_embedding.weight': torch.ones(16, 3, 4, 4)}
    message = refusal({'state_dict': prefixed('model.encoder.', clay)})
    assert "The nearest is SimpleViT of vit-pytorch 1.4.1 and later at 'state_dict.model.encoder'" in message
    assert '- to_patch_embedding.2.weight 16 x channels x patch area: missing' in message
    assert '+ patch_embedding.weight 16 x 3 x 4 x 4: not part of the model' in message
    assert "part='transformer' converts it alone" in message


def test_every_unexplained_name_is_an_error() -> None:
    state_dict = dict(module('DeepViT').state_dict())
    for name in (
        'extra',
        'transformer.layers.0.0.temperature',
        'transformer.layers.0.1.net.7.weight',
        'mlp_head.2.bias',
    ):
        for prefix in ('', 'module.'):
            message = refusal(prefixed(prefix, state_dict | {name: torch.ones(3)}))
            assert f'+ {name} 3: not part of the model' in message


def test_what_is_common_to_all_blocks_is_said_once() -> None:
    whole = simple_vit.SimpleViT(**FIELDS | {'depth': 3}).state_dict()
    state_dict = {name: tensor for name, tensor in whole.items() if '.to_out.' not in name}
    for block in (0, 2):
        del state_dict[f'transformer.layers.{block}.0.norm.bias']
    message = refusal(state_dict)
    assert '  - transformer.layers.#.0.to_out.weight 16 x 21: missing (each block #)' in message
    assert message.count('to_out') == 1
    for block in (0, 2):
        assert f'  - transformer.layers.{block}.0.norm.bias 16: missing\n' in message


# ---- live modules


@pytest.mark.parametrize('ported', [simple_flash_attn_vit, simple_vit_with_patch_dropout])
@pytest.mark.filterwarnings('ignore:.*sdp_kernel')
def test_modules_that_compute_what_simple_vit_does(ported: Any, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ported, 'posemb_sincos_2d', port_table)
    inner = perturbed(ported.SimpleViT(**FIELDS)).double()
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    port, variables = convert.from_torch(inner, image_size=8)
    with torch.no_grad():
        truth = inner(channels_first(images)).numpy()
    assert relative_error(jax.jit(port.apply)(variables, images), truth) <= FLOAT64_BOUND


def test_a_subclass_and_a_namesake_are_other_modules() -> None:
    class SimpleViT(simple_vit.SimpleViT):
        def forward(self, images: torch.Tensor) -> Any:
            return 2 * super().forward(images)

    mine = SimpleViT(**FIELDS)
    for other in (mine, WithValueResidual(**FIELDS)):
        message = refusal(other)
        assert f'This module is a {type(other).__module__}.{type(other).__qualname__}, which is none of' in message
        assert message.endswith('If it computes what one of those does, pass its state_dict().')
    assert_same(inspect(mine.state_dict()).tensors, mine.state_dict())


class Doubled(simple_vit.Attention):
    def forward(self, x: torch.Tensor) -> Any:
        return 2 * super().forward(x)


def replace(inner: Any, name: str, part: Any) -> None:
    parent, _, last = name.rpartition('.')
    setattr(inner.get_submodule(parent), last, part)


REPLACED: dict[str, tuple[Callable[[Any], Any], str]] = {
    'another activation': (
        lambda inner: replace(inner, 'transformer.layers.1.1.net.2', torch.nn.ReLU()),
        r'net\.2 is a torch\..*ReLU, but a vit_pytorch\.simple_vit\.SimpleViT has a torch\..*GELU\(approximate=',
    ),
    'another GELU': (
        lambda inner: replace(inner, 'transformer.layers.1.1.net.2', torch.nn.GELU('tanh')),
        r"net\.2 is a .*GELU\(approximate='tanh'\), but a .* has a .*GELU\(approximate='none'\) there",
    ),
    'another epsilon': (
        lambda inner: setattr(inner.transformer.norm, 'eps', 1e-6),
        r'transformer\.norm is a .*LayerNorm\(eps=1e-06\), but a .* has a .*LayerNorm\(eps=1e-05\) there',
    ),
    'another axis': (
        lambda inner: setattr(inner.transformer.layers[0][0].attend, 'dim', -2),
        r'attend is a .*Softmax\(dim=-2\), but',
    ),
    'no softmax': (
        lambda inner: replace(inner, 'transformer.layers.0.0.attend', torch.nn.Identity()),
        r'attend is a .*Identity, but',
    ),
    'a layer more': (
        lambda inner: inner.transformer.layers[0][1].net.append(torch.nn.GELU()),
        r'transformer\.layers\.0\.1\.net\.4 is a .*GELU.*, but a .*SimpleViT has no such part',
    ),
    'a layer less': (
        lambda inner: inner.transformer.layers[0][1].net.pop(3),
        r'transformer\.layers\.0\.1\.net\.3 is missing, but a .*SimpleViT has a .*Linear there',
    ),
    'patches in another order': (
        lambda inner: setattr(inner.to_patch_embedding[0], 'pattern', 'b c (h p1) (w p2) -> b (h w) (c p1 p2)'),
        r"to_patch_embedding\.0 is a .*Rearrange\(pattern='.*\(c p1 p2\)'\), but",
    ),
    'another attention': (
        lambda inner: replace(inner, 'transformer.layers.0.0', Doubled(16, heads=3, dim_head=7)),
        r'layers\.0\.0 is a .*Doubled, but',
    ),
    'a forward of its own': (
        lambda inner: setattr(inner.transformer, 'forward', lambda x: x),
        'transformer has a forward that is not of its class',
    ),
    'the forward of the whole': (
        lambda inner: setattr(inner, 'forward', lambda x: x),
        'The module has a forward that is not of its class',
    ),
    'another number of heads': (
        lambda inner: setattr(inner.transformer.layers[1][0], 'heads', 7),
        r'layers\.1\.0 has heads=7 and scale=.*first block has heads=3 every block has these',
    ),
    'another scale': (
        lambda inner: setattr(inner.transformer.layers[1][0], 'scale', 1.0),
        r'layers\.1\.0 has heads=3 and scale=1\.0.* scale=0\.37.* \(7\*\*-0\.5\)',
    ),
    'a weight norm': (
        lambda inner: torch.nn.utils.parametrizations.weight_norm(inner.linear_head),
        r'parametrised weights here .linear_head.parametrizations',
    ),
    'another table': (
        lambda inner: inner.pos_embedding.mul_(2),
        'pos_embedding is not the sincos table of SimpleViT: another function',
    ),
}


@pytest.mark.parametrize('change', REPLACED)
def test_a_module_with_another_part_is_another_function(change: str) -> None:
    inner = module()
    act, message = REPLACED[change]
    act(inner)
    with pytest.raises(ConversionError, match=message):
        inspect(inner)


def test_a_part_used_twice_is_no_part_missing() -> None:
    """Shared weights are in the state dict twice, and become two equal parts, which compute the same."""
    inner: Any = module()
    inner.transformer.layers[1][0] = inner.transformer.layers[0][0]
    assert_same(inspect(inner).tensors, inner.state_dict())


def test_hooks_are_a_warning_and_taken_away_they_are_not() -> None:
    inner: Any = module()
    hook = inner.transformer.register_forward_hook(lambda *_: None)
    with pytest.warns(ConversionWarning, match=r'^There are hooks on transformer, which are not converted\.'):
        convert.from_torch(inner)
    hook.remove()
    convert.from_torch(inner)


def test_checking_a_module_draws_no_random_numbers() -> None:
    inner = module('DeepViT')
    before = torch.random.get_rng_state()
    inspect(inner)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_module_that_holds_two_names_both() -> None:
    """As ema-pytorch's wrapper does: the trained model and its average."""
    wrapper = torch.nn.Module()
    wrapper.online_model, wrapper.ema_model = module('SimpleViT'), module('SimpleViT')
    with pytest.raises(ConversionError, match=r'It holds 2, .*\(.online_model.\), module.get_submodule\(.ema_model.\)'):
        convert.inspect(wrapper)


def test_names_in_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    state_dict = module().state_dict()
    save = {'model': state_dict, 'a\x1b[2J': torch.ones(2), 'config\x1b[2J': {'heads': 3, 'dim': 16, 'depth': 2}}
    torch.save(save | {'note': 'b\x1b[2J'}, tmp_path / 'x.pt')
    inspection = inspect(tmp_path / 'x.pt')
    assert all(text.isprintable() for pair in inspection.unwrapped.left_aside.items() for text in pair)
    assert all(field.why.isprintable() for field in inspection.fields.values())
    assert refusal(state_dict | {'a\x1b[2J': torch.ones(2)}).replace('\n', '').isprintable()
    many = {f'{"long" * 100}{number}.weight': torch.ones(1) for number in range(1000)}
    assert len(refusal(state_dict | many)) < 10_000
