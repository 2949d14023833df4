"""What `verify` takes, what it refuses, and the words of its verdict."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.simple_vit import SimpleViT

import convert
import flax_vit.layers
import flax_vit.products
from convert import ConversionError
from convert.proof.saved_outputs import compare_outputs
from parity_tests.support.reference import perturbed


def simple(**fields: Any) -> torch.nn.Module:
    sizes: dict[str, Any] = {'image_size': (8, 12), 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'mlp_dim': 8}
    return perturbed(SimpleViT(**sizes | {'depth': 1, 'heads': 2, 'dim_head': 4} | fields))


def deep(**fields: Any) -> torch.nn.Module:
    sizes: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 5, 'dim': 12, 'mlp_dim': 8}
    return perturbed(DeepViT(**sizes | {'depth': 1, 'heads': 3} | fields))


def test_images_of_every_kind() -> None:
    """In either order of axes, of NumPy, JAX or PyTorch: the same figures. And PyTorch's random numbers go on."""
    module = simple()
    images = np.random.default_rng(0).standard_normal((2, 8, 12, 3), np.float32)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    rows = convert.verify(module, images=images).rows
    assert torch.rand(1) == expected
    for same in (images.transpose(0, 3, 1, 2), jnp.asarray(images), torch.tensor(images)):
        assert convert.verify(module, images=same, dtype=jnp.float32).rows == rows


def test_images_that_do_not_fit() -> None:
    module = simple()
    for images, words in (
        (np.zeros((1, 8, 8, 3), np.float32), 'takes images of shape'),
        (np.zeros((1, 8, 12, 3), np.int64), 'floating-point'),
    ):
        with pytest.raises(ValueError, match=words):
            convert.verify(module, images=images)
    for dtype in ('fp16', 'int8', None):
        with pytest.raises(ValueError, match='dtype must be float64, float32'):
            convert.verify(module, dtype=dtype)


def test_a_model_of_another_source() -> None:
    module = deep()
    others = (deep(depth=2), deep(dim=16), deep(num_classes=4))
    for other in others:
        with pytest.raises(ConversionError, match='The converted model is none of vit_pytorch'):
            convert.verify(module, converted=convert.from_torch(other))
    with pytest.raises(ConversionError, match=r'The converted model is a SimpleViT, but .* holds a DeepViT'):
        convert.verify(module, converted=convert.from_torch(simple()))
    model, variables = convert.from_torch(module)
    with pytest.raises(ValueError, match='The variables of a DeepViT are'):
        convert.verify(module, converted=(model, variables['params']))


def test_what_both_sides_share_is_named() -> None:
    """Whatever neither the weights nor the caller tell is no part of a bare verdict."""
    state_dict = deep(dim_head=64).state_dict()
    report = convert.verify(state_dict, count=1)
    assert report.right
    shared = "if image_size=8, patch_size=4, pool='cls', channels=3: both sides"
    assert shared in report.verdict  # nothing of dropout: it changes no output that is compared
    assert repr(report) == f'<Report: RIGHT: {report.verdict}>'
    assert "pool='cls' (assumed), " in repr(report.inspection)
    told: dict[str, Any] = {'pool': 'cls', 'channels': 3}
    assert convert.verify(state_dict, count=1, **told).verdict == 'the Flax model computes what PyTorch does.'
    model, variables = convert.from_torch(state_dict, **told | {'pool': 'mean', 'dropout': 0.0, 'emb_dropout': 0.0})
    report = convert.verify(state_dict, converted=(model, variables), count=1)
    assert report.right
    assert "if pool='mean'" in report.verdict.replace('image_size=8, patch_size=4, ', '')
    report = convert.verify(state_dict, converted=(model, variables), count=1, **told)
    assert not report.right
    assert report.causes == ['pooled features: matches if pooled by the mean of all tokens instead of the class token']


@pytest.mark.parametrize('build', [simple, deep])
def test_a_matrix_that_is_off_by_three_millionths(build: Callable[[], torch.nn.Module]) -> None:
    """Relative to its size, at random: 25 times float32's rounding of one number, and no rounding in float64."""
    module = build()
    model, variables = convert.from_torch(module)
    net = variables['params']['transformer']['layers_0_1']['net_1']
    noise = np.random.default_rng(0).standard_normal(net['kernel'].shape)
    net['kernel'] = jnp.asarray(net['kernel'] * (1 + 3e-6 * noise), jnp.float32)
    report = convert.verify(module, converted=(model, variables), count=1)
    assert not report.right
    assert report.causes[0].startswith("block 0 feed-forward: net.1.weight: not the source's, at most ")


def test_too_coarse_is_not_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flax_vit.products.product

    def coarse(equation: str, x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
        if x.dtype == jnp.float32:
            x, y = (jax.lax.reduce_precision(each, 8, 10) for each in (x, y))
        return right(equation, x, y, **options)

    monkeypatch.setattr(flax_vit.layers, 'product', coarse)
    report = convert.verify(simple(), count=2)
    assert not report.right
    assert report.verdict.startswith('the same function, computed too coarsely: in float64 both agree, but in float32 ')
    assert report.causes == [
        "patch embedding: matches with matrix products in TF32 or float16 (set precision='highest')"
    ]


def test_ambiguous_images_are_verified_as_asked() -> None:
    """As many channels as pixels a side, in PyTorch's order."""
    module = perturbed(
        SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20, channels=8)
    )
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 8), np.float32)
    model: Any
    model, variables = convert.from_torch(module, image_format='channels_first')
    assert convert.verify(module, images=images, image_format='channels_first').right
    assert convert.verify(module, converted=(model, variables), count=2).right
    truth = module(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(model.apply(variables, images), truth, atol=1e-5)
    assert compare_outputs(model, variables, images, truth).right
