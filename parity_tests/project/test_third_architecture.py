"""A new architecture is two files, here one for a test, and its line in each package's list."""

import ast
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

import convert
from convert.architectures import ARCHITECTURES
from convert.command_line.cli import main
from flax_vit import PretrainedWarning, features, from_pretrained, save_pretrained, shardings, to_nnx
from flax_vit.architectures import MODELS
from flax_vit.mesh import COLUMNS
from parity_tests.support.pages import ROOT
from parity_tests.support.reference import perturbed
from parity_tests.support.third_vit import ThirdViT, ThirdViTArchitecture, TorchThirdViT

SIZES: Any = {
    'image_size': (8, 12),
    'patch_size': 4,
    'num_classes': 5,
    'dim': 16,
    'depth': 2,
    'heads': 2,
    'mlp_dim': 20,
}
TOLD: Any = {'image_size': (8, 12), 'patch_size': 4, 'heads': 2}


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    monkeypatch.setitem(MODELS, 'ThirdViT', ThirdViT)
    ARCHITECTURES.append(ThirdViTArchitecture())
    path = tmp_path / 'third.pt'
    torch.save({'state_dict': perturbed(TorchThirdViT(**SIZES), 0).state_dict()}, path)
    yield path
    ARCHITECTURES.pop()


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # channels are assumed
def test_it_is_converted_and_proven(checkpoint: pathlib.Path) -> None:
    report = convert.verify(checkpoint, **TOLD, gradients=True, attention=True, count=2)
    assert report.right
    assert len(report.attention) == 2
    module = perturbed(TorchThirdViT(**SIZES), 0)
    assert convert.inspect(module, image_size=(8, 12)).model == convert.inspect(checkpoint, **TOLD).model
    model, variables = convert.from_torch(checkpoint, **TOLD)
    back = convert.to_torch(model, variables)
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')
def test_a_wrong_port_is_told_without_a_cause(checkpoint: pathlib.Path) -> None:
    model: Any
    model, variables = convert.from_torch(checkpoint, **TOLD)
    variables['params']['classifier']['bias'] += 1
    report = convert.verify(checkpoint, converted=(model, variables), **TOLD)
    assert not report.right
    assert 'no mistakes are known of a ThirdViT' in report.causes[0]


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # channels are assumed
def test_it_is_at_home_in_flax_vit(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model: Any
    model, variables = convert.from_torch(checkpoint, **TOLD)
    images = np.random.default_rng(0).standard_normal((2, 8, 12, 3), np.float32)
    logits = model.apply(variables, images)
    seen = features(model, variables, images, attention=True)
    np.testing.assert_allclose(seen.logits, logits, rtol=0, atol=1e-5)
    assert seen.attention[1].shape == (2, 2, 6, 6)
    save_pretrained(tmp_path / 'folder', model, variables)
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ('data', 'model'))
    again: Any
    again, spread = from_pretrained(tmp_path / 'folder', mesh=mesh)
    assert again == model
    np.testing.assert_allclose(jax.jit(again.apply)(spread, images), logits, rtol=0, atol=1e-5)
    split = shardings(variables, mesh)['params']
    assert split['classifier']['kernel'].spec == split['transformer']['layers_0_0']['to_qkv']['kernel'].spec == COLUMNS
    np.testing.assert_allclose(to_nnx(model, variables)(images), logits, rtol=0, atol=1e-5)
    larger: Any
    with pytest.warns(PretrainedWarning) as warned:
        larger, resized = from_pretrained(tmp_path / 'folder', num_classes=7, image_size=(16, 8))
    told = ' '.join(str(warning.message) for warning in warned)
    assert 'pos_embedding is resized' in told
    assert 'classifier' in told
    assert larger.apply(resized, np.ones((1, 16, 8, 3), np.float32)).shape == (1, 7)


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # channels are assumed
def test_it_is_shown(
    checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('sys.argv', ['flax-vit', 'inspect', str(checkpoint), '--image-size', '8x12', '--heads', '2'])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert 'ThirdViT' in capsys.readouterr().out


def test_no_module_asks_for_a_model_by_name() -> None:
    """But its own files, and the packages' lists."""
    names = {model.__name__ for model in MODELS.values()}
    files = {f'{model.__module__.rpartition(".")[2]}.py' for model in MODELS.values()}
    own = {*files, '__init__.py', 'architectures.py'}
    found = [
        f'{path.relative_to(ROOT)}:{node.lineno}'
        for package in ('convert', 'flax_vit')
        for path in sorted((ROOT / package).rglob('*.py'))
        if path.name not in own
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Constant) and node.value in names)
    ]
    assert not found
