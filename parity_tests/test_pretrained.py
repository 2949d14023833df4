"""Folders: what save_pretrained writes, from_pretrained reads, at any moment and whatever else is there."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import flax_vit.pretrained
from flax_vit import DeepViT, SimpleViT, from_pretrained, save_pretrained

MODELS = {
    'simple': SimpleViT(image_size=(8, 12), patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20),
    'deep': DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20, pool='mean'),
}


def variables_of(model: Any, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = flax_vit.pretrained.param_shapes(model)
    flat = {path: jnp.asarray(random.normal(size=shape.shape), model.param_dtype) for path, shape in shapes.items()}
    return {'params': unflatten_dict(flat)}


def assert_equal(one: Any, other: Any) -> None:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', MODELS)
def test_what_is_saved_is_read(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    model = MODELS[name].clone(param_dtype=jnp.dtype(dtype), dtype=jnp.dtype('bfloat16'), precision='highest')
    variables = variables_of(model)
    save_pretrained(tmp_path / 'out', model, variables, source={'from': 'here'})
    read, read_variables = from_pretrained(tmp_path / 'out')
    assert read == model
    assert_equal(read_variables, variables)
    assert flax_vit.pretrained.read_config(tmp_path / 'out')['source'] == {'from': 'here'}


def test_float64_is_kept_or_said_to_be_rounded(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        model = MODELS['simple'].clone(param_dtype=jnp.dtype('float64'))
        variables = variables_of(model)
        save_pretrained(tmp_path, model, variables)
        assert_equal(from_pretrained(tmp_path)[1], variables)
    with pytest.warns(UserWarning, match='float64 parameters are rounded to float32'):
        from_pretrained(tmp_path)


def test_overrides(tmp_path: pathlib.Path) -> None:
    save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']))
    model, variables = from_pretrained(tmp_path, dtype='bfloat16', param_dtype='float16', dropout=0.5)
    assert (model.dtype, model.param_dtype, model.dropout) == (jnp.bfloat16, jnp.float16, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float16')}
    with pytest.raises(ValueError, match='DeepViT has no field colour'):
        from_pretrained(tmp_path, colour='red')
    with pytest.raises(ValueError, match=r'params/mlp_head_1/kernel: the shape is \(16, 3\), expected \(16, 7\)'):
        from_pretrained(tmp_path, num_classes=7)


def test_one_model_replaces_another(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple'], seed))
    assert_equal(from_pretrained(tmp_path)[1], variables_of(MODELS['simple'], 1))
    assert len(list(tmp_path.iterdir())) == 2
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        (tmp_path / 'config.json').stat().st_mode & 0o777
    }


@pytest.mark.parametrize('step', ['save_file', '_sha256', 'json.dumps'])
def test_an_interrupted_save_leaves_the_old_model(
    step: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = variables_of(MODELS['simple'], 0)
    save_pretrained(tmp_path, MODELS['simple'], old)

    def interrupt(*_arguments: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f'flax_vit.pretrained.{step}', interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple'], 1))
    assert_equal(from_pretrained(tmp_path)[1], old)
    assert not list(tmp_path.glob('*.incomplete'))
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple'], 2))  # nothing left is in the way
    assert len(list(tmp_path.iterdir())) == 2


def test_other_peoples_files_are_left_alone(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match=r'holds other files .thesis\.txt'):
        save_pretrained(tmp_path / 'folder', MODELS['simple'], variables)
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match='not the configuration of a model'):
        save_pretrained(tmp_path / 'hub', MODELS['simple'], variables)
    with pytest.raises(ValueError, match='is a file'):
        save_pretrained(tmp_path / 'folder' / 'thesis.txt', MODELS['simple'], variables)
    assert (tmp_path / 'folder' / 'thesis.txt').read_text() == 'years of work'


def test_wrong_variables_are_not_saved(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    with pytest.raises(ValueError, match=r"\{'params': …\}"):
        save_pretrained(tmp_path / 'out', MODELS['simple'], variables['params'])
    with pytest.raises(ValueError, match='linear_head/bias'):
        save_pretrained(tmp_path / 'out', MODELS['simple'].clone(num_classes=4), variables)
    with pytest.raises(ValueError, match='takes a DeepViT or a SimpleViT, not a Dense'):
        save_pretrained(tmp_path / 'out', nn.Dense(3), variables)
    assert not (tmp_path / 'out').exists()


def test_damage_is_noticed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'config\.json'):
        from_pretrained(tmp_path)
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    (weights,) = tmp_path.glob('model-*.safetensors')
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match='is damaged'):
        from_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for change in ({'format': 'flax_vit 99'}, {'model': 'ViT'}, {'weights': {'file': '../model-x.safetensors'}}):
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match='not the configuration'):
            from_pretrained(tmp_path)


def test_the_weights_are_plain_safetensors(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    save_pretrained(tmp_path, MODELS['simple'], variables)
    (weights,) = tmp_path.glob('model-*.safetensors')
    kernel = load_file(weights)['params/linear_head/kernel']
    assert np.array_equal(kernel, variables['params']['linear_head']['kernel'])
