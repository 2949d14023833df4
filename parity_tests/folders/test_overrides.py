"""Fields that are changed on reading: a new head, another image size, and what is refused."""

import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_vit import PretrainedWarning, from_pretrained, save_pretrained
from flax_vit.folders.overrides import resize_positions
from parity_tests.support.small_models import MODELS, assert_equal, variables_of


def outputs(model: Any, variables: Any, height: int, width: int) -> tuple[int, ...]:
    """The shape of what the model gives for two such images."""
    return jax.eval_shape(model.apply, variables, jnp.zeros((2, height, width, 3))).shape


@pytest.fixture(params=['simple', 'deep'])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """Holds a model of that name."""
    path = tmp_path / request.param
    save_pretrained(path, MODELS[request.param], variables_of(MODELS[request.param]))
    return path


def test_a_new_head_is_as_init_gives_it(folder: pathlib.Path) -> None:
    key = jax.random.key(5)
    with pytest.warns(PretrainedWarning, match=r'head is new and untrained \(params/(linear_head|mlp_head_1)/bias'):
        model, variables = from_pretrained(folder, num_classes=7, key=key)
    assert model == MODELS[folder.name].clone(num_classes=7)
    fresh: Any = model.init(key, jnp.zeros((1, 8, 12 if folder.name == 'simple' else 8, 3)))['params']
    expected = variables_of(MODELS[folder.name])['params']
    head = 'linear_head' if folder.name == 'simple' else 'mlp_head_1'
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(variables['params'][head].pop(name), fresh[head][name], rtol=1e-6)
        del expected[head][name]
    assert_equal(variables['params'], expected)
    with pytest.warns(PretrainedWarning):
        other = from_pretrained(folder, num_classes=7)[1]
    assert not np.array_equal(other['params'][head]['kernel'], fresh[head]['kernel'])


def test_no_head_and_from_none_to_one(folder: pathlib.Path) -> None:
    model, variables = from_pretrained(folder, num_classes=0)
    assert not [name for name in variables['params'] if 'head' in name]
    size = (8, 12 if folder.name == 'simple' else 8)
    assert outputs(model, variables, *size) == (2, 16)
    save_pretrained(folder, model, variables)
    with pytest.warns(PretrainedWarning, match='head is new'):
        model, variables = from_pretrained(folder, num_classes=5, param_dtype='bfloat16')
    assert outputs(model, variables, *size) == (2, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('bfloat16')}


def test_the_same_number_of_classes_is_the_same_head(folder: pathlib.Path) -> None:
    assert_equal(from_pretrained(folder, num_classes=3)[1], variables_of(MODELS[folder.name]))


def test_another_image_size(folder: pathlib.Path) -> None:
    expected = variables_of(MODELS[folder.name])
    if folder.name == 'simple':  # nothing to resize: the table is computed
        model, variables = from_pretrained(folder, image_size=(16, 20))
        assert outputs(model, variables, 16, 20) == (2, 3)
    else:
        with pytest.warns(PretrainedWarning, match='pos_embedding is resized'):
            model, variables = from_pretrained(folder, image_size=20)
        assert outputs(model, variables, 20, 20) == (2, 3)
        table = variables['params'].pop('pos_embedding')
        saved = expected['params'].pop('pos_embedding')
        assert (table.shape, table.dtype) == ((*saved.shape[:-2], 26, 16), jnp.float32)
        grid = MODELS[folder.name].grid
        np.testing.assert_allclose(table, resize_positions(np.asarray(saved), grid, (5, 5)), rtol=1e-6)
    assert_equal(variables, expected)


@pytest.mark.parametrize(('old', 'new'), [(4, 7), (4, 9), (7, 4), (1, 3), (3, 1), (14, 16)])
def test_positions_are_resized_as_pytorch_does(old: int, new: int, float64: None) -> None:
    table = np.random.default_rng(0).normal(size=(1, old**2 + 1, 5))
    grid = torch.from_numpy(table[:, 1:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode='bicubic', align_corners=False)
    resized = resize_positions(table, (old, old), (new, new))
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])
    # Each is a sum of 16 products in float64, the weights below 2 in sum.
    limit = 32 * np.finfo(np.float64).eps * np.abs(table).max()
    assert np.abs(resized[:, 1:] - grid.permute(0, 2, 3, 1).reshape(1, new**2, 5).numpy()).max() <= limit
    np.testing.assert_array_equal(resize_positions(table[0], (old, old), (new, new)), resized[0])


def test_an_unchanged_grid_is_unchanged(float64: None) -> None:
    table = np.random.default_rng(0).normal(size=(1, 10, 4))
    assert np.array_equal(resize_positions(table, (3, 3), (3, 3)), table)


def test_what_else_would_change_shapes_is_refused(folder: pathlib.Path) -> None:
    saved, needed = r'saved \(16, 384\), needed \(', r', 384\)'
    refused: dict[str, Any] = {
        'dim': (32, rf'layers_0_0/to_qkv/kernel: {saved}32{needed}'),
        'heads': (4, r'layers_0_0/to_qkv/kernel: saved \(16, 384\), needed \(16, 768\)'),
        'depth': (2, r'layers_1_0/norm/bias: saved nothing, needed \(16,\)'),
        'mlp_dim': (8, r'net_1/bias: saved \(20,\), needed \(8,\)'),
        'patch_size': (2, r'kernel: saved \(48, 16\), needed \(12, 16\)'),
        'channels': (1, r'kernel: saved \(48, 16\), needed \(16, 16\)'),
        'patch_norm': (False, 'needed nothing'),
    }
    for name, (value, words) in refused.items():
        with pytest.raises(ValueError, match=rf'(?s)do not fit a model with {name}={value}; .*{words}'):
            from_pretrained(folder, **{name: value})
    with pytest.raises(ValueError, match='has no field colour'):
        from_pretrained(folder, colour='red')
    with pytest.raises(ValueError, match=r'param_dtype=float64 needs 64-bit mode: .*jax_enable_x64'):
        from_pretrained(folder, param_dtype='float64')


def test_heads_change_together_with_dim_head(folder: pathlib.Path) -> None:
    """Where the weights hold only their product; DeepViT's tell the heads."""
    told = '; heads and dim_head change together' if folder.name == 'simple' else ':'
    with pytest.raises(ValueError, match=f'only num_classes and image_size may change their shapes{told}'):
        from_pretrained(folder, heads=4)
    if folder.name == 'simple':
        with pytest.warns(PretrainedWarning, match='makes another function of the same weights'):
            assert from_pretrained(folder, heads=4, dim_head=32)[0].heads == 4


@pytest.mark.usefixtures('unchecked')
def test_what_is_no_key(folder: pathlib.Path) -> None:
    for key in (3, 'a'):
        with pytest.raises(ValueError, match=f'key must be a random key of JAX, .* not {key!r}'):
            from_pretrained(folder, num_classes=7, key=key)  # type: ignore[arg-type]


def test_other_patches_are_refused_even_if_they_fit(folder: pathlib.Path) -> None:
    fit: Any = {'patch_size': 2, 'channels': 12, 'image_size': 4 if folder.name == 'deep' else (4, 6)}
    with pytest.raises(ValueError, match=r'=.* does not fit the saved parameters: their first matrix is for'):
        from_pretrained(folder, **fit)
    if folder.name == 'simple':
        assert from_pretrained(folder, patch_size=(4, 4))[0].grid == (2, 3)  # the same


def test_another_function_of_the_same_weights_is_said(folder: pathlib.Path) -> None:
    another: dict[str, dict[str, Any]] = {
        'simple': {'heads': 4, 'dim_head': 32}, 'deep': {'pool': 'cls'}, 'vit': {'pool': 'mean', 'scale_by_dim': True}
    }  # fmt: skip
    fields = another[folder.name]
    with pytest.warns(PretrainedWarning, match='makes another function of the same weights') as said:
        model, variables = from_pretrained(folder, **fields)
    assert len(said) == len(fields)
    assert model == MODELS[folder.name].clone(**fields)
    assert_equal(variables, variables_of(MODELS[folder.name]))


@pytest.mark.parametrize('dtype', ['int8', 'bool', 'complex64', 'float8_e4m3fn', 'bf16', 'foo', 3, None])
def test_what_weights_and_computations_cannot_be_in(dtype: Any, folder: pathlib.Path) -> None:
    for name in ('param_dtype', 'dtype'):
        if (name, dtype) != ('dtype', None):
            with pytest.raises(
                ValueError, match=rf'{name} must be float64, float32, float16 or bfloat16, not .*{dtype}'
            ):
                from_pretrained(folder, **{name: dtype})


def test_nothing_is_said_when_nothing_is_new(folder: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        from_pretrained(folder, dtype='bfloat16')
