"""What a source says of its model beside the weights is heard, and never a silent guess."""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.simple_vit import SimpleViT

import convert
from convert import ConversionError
from convert.recognition.arguments import groups
from flax_vit import save_pretrained
from parity_tests.support.reference import perturbed

SIMPLE: dict[str, Any] = {'image_size': (8, 12), 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'depth': 1}
SIMPLE |= {'heads': 2, 'mlp_dim': 20, 'channels': 2, 'dim_head': 32}  # whose dim_head is not the assumed one
DEEP: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'depth': 1, 'heads': 2}
DEEP |= {'mlp_dim': 20, 'pool': 'mean', 'dropout': 0.1, 'emb_dropout': 0.2}
SAID: dict[str, Any] = {
    'hyper_parameters': lambda fields: {'hyper_parameters': fields},
    'hyper_parameters.model': lambda fields: {'hyper_parameters': {'lr': 1e-3, 'model': {'name': 'vit', **fields}}},
    'hyper_parameters.vit': lambda fields: {'hyper_parameters': {f'vit_{name}': fields[name] for name in fields}},
    'hyper_parameters.net': lambda fields: {'hyper_parameters': {f'net.{name}': fields[name] for name in fields}},
    'config': lambda fields: {'config': fields},
    'cfg.model.args': lambda fields: {'cfg': {'model': {'type': 'SimpleViT', 'args': fields}}},
    'args': lambda fields: {'args': argparse.Namespace(**fields, lr=0.1, out=pathlib.PurePosixPath('x'))},
    'hparams': lambda fields: {'hparams': {**fields, 'image_size': np.int64(8)} if fields is DEEP else fields},
    'model_args': lambda fields: {'model_args': {**fields, 'patch_size': [4, 4]}},
    'anything': lambda fields: {'anything': fields, 'lr_schedulers': [], 'epoch': 3},
}


def module(fields: dict[str, Any]) -> torch.nn.Module:
    return perturbed(DeepViT(**fields) if 'pool' in fields else SimpleViT(**fields))


@pytest.mark.parametrize('fields', [SIMPLE, DEEP], ids=['simple', 'deep'])
@pytest.mark.parametrize('where', SAID)
def test_it_fills_what_the_weights_leave_open(where: str, fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
    state_dict = {f'model.{name}': tensor for name, tensor in module(fields).state_dict().items()}
    torch.save({'state_dict': state_dict, **SAID[where](fields)}, tmp_path / 'last.ckpt')
    inspection = convert.inspect(tmp_path / 'last.ckpt')
    assert not inspection.assumptions
    assert {name: getattr(inspection.model, name) for name in fields} == fields
    assert convert.inspect({'state_dict': state_dict, **SAID[where](fields)}).fields == inspection.fields
    read = {field.why for field in inspection.fields.values() if field.how == 'read'}
    assert read == {where}


@pytest.mark.parametrize('fields', [SIMPLE, DEEP], ids=['simple', 'deep'])
def test_what_is_read_is_not_assumed_by_the_verdict(fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
    torch.save({'state_dict': module(fields).state_dict(), 'hyper_parameters': fields}, tmp_path / 'last.ckpt')
    report = convert.verify(tmp_path / 'last.ckpt', count=1)
    assert report.verdict == 'the Flax model computes what PyTorch does.'


def test_a_config_beside_the_weights(tmp_path: pathlib.Path) -> None:
    save_file(module(SIMPLE).state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(SIMPLE))
    for source in (tmp_path, tmp_path / 'model.safetensors'):
        assert convert.inspect(source).model.heads == 2
    (tmp_path / 'config.json').write_text('{"heads": ')
    with pytest.raises(ConversionError, match=r'config\.json, beside the weights, cannot be read'):
        convert.inspect(tmp_path)


def test_what_is_exported_says_it_all(tmp_path: pathlib.Path) -> None:
    model, variables = convert.from_torch(module(SIMPLE))
    save_pretrained(tmp_path / 'out', model, variables)
    command: list[Any] = [sys.executable, '-m', 'flax_vit', 'export']
    command += [tmp_path / 'out', tmp_path / 'back.safetensors']
    subprocess.run(command, check=True, capture_output=True)
    assert convert.inspect(tmp_path / 'back.safetensors').model == model


def test_what_is_given_comes_first(tmp_path: pathlib.Path) -> None:
    source = {'model': module(DEEP).state_dict(), 'config': DEEP}
    assert convert.inspect(source, pool='cls').model.pool == 'cls'
    with pytest.raises(ConversionError, match='contradicts the weights'):
        convert.inspect(source, heads=4)


def test_several_that_differ_are_shown() -> None:
    source = {'model': module(DEEP).state_dict(), 'config': DEEP, 'hparams': DEEP | {'pool': 'cls'}}
    with pytest.raises(
        ConversionError, match=r"pool is '\w+' by (config|hparams), but '\w+' by (config|hparams): give"
    ):
        convert.inspect(source)
    assert convert.inspect(source, pool='mean').fields['dropout'].how == 'read'


@pytest.mark.parametrize('wrong', [{'dim': 24}, {'num_classes': 7}, {'dim_head': 24}, {'patch_size': 5}])
def test_one_that_contradicts_the_weights_is_shown(wrong: dict[str, Any]) -> None:
    """The advice, to give what the weights don't tell, works."""
    source = {'state_dict': module(SIMPLE).state_dict(), 'hyper_parameters': SIMPLE | wrong}
    with pytest.raises(ConversionError, match='What the source says about its model does not fit') as refusal:
        convert.inspect(source)
    assert str(next(iter(wrong.values()))) in str(refusal.value)
    told = {name: SIMPLE[name] for name in ('image_size', 'patch_size', 'channels', 'heads', 'dim_head')}
    assert all(f'{name}=…' in str(refusal.value) for name in told)
    assert {name: getattr(convert.inspect(source, **told).model, name) for name in SIMPLE} == SIMPLE


def test_what_is_not_of_the_model_is_nothing() -> None:
    """Optimizers, schedules and other models have words of ours, too."""
    others = {
        'optimizer': {'param_groups': [{'lr': 0.1, 'dropout': 0.3}], 'state': {0: {'heads': 16}}},
        'text_model': {'dim': 512, 'heads': 8, 'depth': 12},
        'hyper_parameters': {'lr': 1e-3, 'dropout': 0.3, 'num_classes': 1000},
        'config': {'heads': 'many', 'pool': None, 'dim_head': [1, 2, 3]},
    }
    source = {'state_dict': module(SIMPLE).state_dict(), **others}
    told: dict[str, Any] = {'image_size': (8, 12), 'patch_size': 4, 'heads': 2}
    assert convert.inspect(source, **told).assumptions == ''
    fields = convert.inspect(source, image_size=(8, 12)).fields
    assert {name for name, field in fields.items() if field.how == 'read'} == set()


def test_dicts_that_hold_each_other_are_entered_once() -> None:
    arguments: dict[str, Any] = dict(SIMPLE)
    arguments['self'] = arguments
    shared = {'hyper_parameters': arguments}
    for _ in range(60):  # 2⁶⁰ ways lead to it
        shared = {'one': shared, 'other': shared}
    found = groups(shared, list(SIMPLE), {})
    assert [dict(each.values) for each in found] == [SIMPLE]


def test_a_config_that_nobody_asks_is_not_read(tmp_path: pathlib.Path) -> None:
    save_file(module(SIMPLE).state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('[' * 100_000)
    with pytest.raises(ConversionError, match=r'config\.json, beside the weights, cannot be read'):
        convert.inspect(tmp_path)
    told = {name: SIMPLE[name] for name in ('image_size', 'patch_size', 'channels', 'heads', 'dim_head')}
    assert convert.inspect(tmp_path, **told).model.heads == 2


def test_metadata_is_no_way_to_harm(tmp_path: pathlib.Path) -> None:
    metadata = {'deep': '{"a":' * 100_000, 'broken': '{"heads": ', 'model_args': json.dumps(SIMPLE)}
    save_file(module(SIMPLE).state_dict(), tmp_path / 'vit.safetensors', metadata)
    assert convert.inspect(tmp_path / 'vit.safetensors').model.heads == 2
