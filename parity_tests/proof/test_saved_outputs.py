"""Outputs that PyTorch gave earlier: kept in a folder as its certificate, or saved by the user."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from convert import ConversionError
from convert.proof.saved_outputs import compare_outputs, golden_of, load_outputs, recheck
from flax_vit import from_pretrained, save_pretrained
from parity_tests.support.reference import CONFIGURATIONS, channels_first, converted, pytorch, random_images

MODELS = ['deep-mean', 'simple-oblong-patches', 'deep-plain', 'simple-plain']


def saved(name: str, dtype: torch.dtype) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """The port, and images with the outputs that PyTorch gives for them in `dtype`, with its own table."""
    configuration = CONFIGURATIONS[name]
    _, model, variables = converted(configuration, torch.float32)
    images = random_images(configuration, batch=16)
    module = pytorch(configuration, torch.float32).to(dtype)
    with torch.no_grad():
        outputs = module(channels_first(images, dtype)).numpy()
    return model, variables, images, outputs


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_saved_outputs_of_the_same_function(name: str, dtype: torch.dtype) -> None:
    model, variables, images, outputs = saved(name, dtype)
    images = images.astype(outputs.dtype)
    comparison = compare_outputs(model, variables, images, outputs)
    assert comparison.right, comparison
    assert (comparison.causes, comparison.images) == ([], 16)


def test_wrong_heads_are_named() -> None:
    """heads and dim_head of SimpleViT are not in the weights: every shape fits, and the function is another."""
    model, variables, images, outputs = saved('simple-oblong-patches', torch.float32)
    comparison = compare_outputs(model.clone(heads=7, dim_head=5), variables, images.astype(np.float32), outputs)
    assert not comparison.right
    assert comparison.causes == ['matches if heads=5 instead of 7']


def test_a_wrong_pool_is_named() -> None:
    model, variables, images, outputs = saved('deep-mean', torch.float32)
    comparison = compare_outputs(model.clone(pool='cls'), variables, images.astype(np.float32), outputs)
    assert not comparison.right
    assert comparison.causes == ["matches if pool='mean' instead of 'cls'"]


@pytest.mark.parametrize('name', ['deep-plain', 'simple-plain'])
def test_another_function_is_not_explained(name: str) -> None:
    model, variables, images, outputs = saved(name, torch.float32)
    comparison = compare_outputs(model, variables, images.astype(np.float32), outputs + np.float32(0.001))
    assert not comparison.right
    assert 'other values of its fields fits' in comparison.causes[0]


def test_outputs_of_another_shape(tmp_path: pathlib.Path) -> None:
    model, variables, images, outputs = saved('simple-plain', torch.float32)
    with pytest.raises(ConversionError, match=r'saved outputs have the shape \(16, 4\), the model gives \(16, 5\)'):
        compare_outputs(model, variables, images, outputs[:, :4])
    path = tmp_path / 'outputs.npz'
    cases: list[tuple[dict[str, Any], str]] = [
        ({'images': images}, 'holds images; images and logits are needed'),
        ({'images': images[1:], 'logits': outputs}, 'one row for each image'),
        ({'images': images, 'logits': outputs.argmax(1)}, 'logits must be floats'),
        (
            {'images': images, 'logits': np.array([{}])},
            r'logits must be an array of numbers, not numpy\.ndarray of \|O',
        ),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(ConversionError, match=message):
            load_outputs(path)
    path.write_text('images')
    with pytest.raises(ConversionError, match=r'should be an \.npz, of .*no checkpoint of a known format'):
        load_outputs(path)
    np.savez(path, images=images, logits=outputs)
    assert np.array_equal(load_outputs(path)[1], outputs)


@pytest.mark.parametrize('name', MODELS[:2])
def test_a_certificate_is_checked_without_pytorch(name: str, tmp_path: pathlib.Path) -> None:
    module = pytorch(CONFIGURATIONS[name], torch.float32)
    report = convert.verify(module, count=4)
    model, variables = convert.from_torch(module)
    save_pretrained(tmp_path, model, variables, golden=golden_of(report))
    assert recheck(tmp_path).right
    assert jax.tree.all(jax.tree.map(np.array_equal, from_pretrained(tmp_path)[1], variables))

    changed = jax.tree.map(lambda array: array, variables)
    changed['params']['transformer']['layers_1_1']['net_1']['bias'] += 1e-5
    save_pretrained(tmp_path, model, changed, golden=golden_of(report))
    row = recheck(tmp_path)
    assert not row.right
    assert row.exact > 1e-9
    save_pretrained(tmp_path, model, variables)
    with pytest.raises(ConversionError, match='keeps no outputs of PyTorch'):
        recheck(tmp_path)


def test_damage_to_a_certified_folder_is_noticed(tmp_path: pathlib.Path) -> None:
    module = pytorch(CONFIGURATIONS['deep-plain'], torch.float32)
    report = convert.verify(module, count=2)
    save_pretrained(tmp_path, *convert.from_torch(module), golden=golden_of(report))
    config = json.loads((tmp_path / 'config.json').read_text())
    config['fields']['pool'] = 'mean'
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert not recheck(tmp_path).right
