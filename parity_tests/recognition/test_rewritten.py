"""What changes the function is never left aside in silence; the advice, followed, converts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.simple_vit import SimpleViT

import convert
from convert import ConversionError
from flax_vit import PretrainedWarning, from_pretrained, save_pretrained
from parity_tests.support.reference import perturbed

TOLD: Any = {'image_size': 8, 'patch_size': 4, 'channels': 3, 'heads': 2, 'dim_head': 64}
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32)


def model() -> Any:
    return perturbed(
        SimpleViT(image_size=8, patch_size=4, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=20, dim_head=64)
    )


def computes_the_same(state_dict: Any, module: Any) -> None:
    flax: Any
    flax, variables = convert.from_torch(state_dict, **TOLD)
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(flax.apply(variables, IMAGES), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('style', ['loralib', 'peft', 'adapters alone'])
def test_lora(style: str) -> None:
    module = model()
    state_dict, merged = dict(module.state_dict()), module.state_dict()
    for block in range(2):
        name = f'transformer.layers.{block}.0.to_qkv'
        weight = state_dict.pop(f'{name}.weight')
        a, b = torch.randn(4, 16) / 8, torch.randn(384, 4) / 8
        merged[f'{name}.weight'] = weight + 0.5 * b @ a
        if style == 'loralib':
            state_dict |= {f'{name}.weight': weight, f'{name}.lora_A': a, f'{name}.lora_B': b}
        else:
            state_dict |= {
                f'{name}.base_layer.weight': weight,
                f'{name}.lora_A.default.weight': a,
                f'{name}.lora_B.default.weight': b,
            }
    if style == 'adapters alone':
        state_dict = {name: tensor for name, tensor in state_dict.items() if 'lora_' in name}
    with pytest.raises(ConversionError, match=r'There are LoRA adapters here .*Merge them'):
        convert.from_torch(state_dict, **TOLD)
    if style != 'adapters alone':
        module.load_state_dict(merged)
        computes_the_same(merged_by_hand(state_dict, scale=0.5), module)


def merged_by_hand(state_dict: Any, scale: float) -> Any:
    """As the advice says."""
    merged = {name.replace('base_layer.', ''): value for name, value in state_dict.items() if 'lora_' not in name}
    for name, a in state_dict.items():
        if 'lora_A' in name:
            merged[name[: name.index('lora_A')] + 'weight'] += scale * state_dict[name.replace('lora_A', 'lora_B')] @ a
    return merged


def pruned(part: Any) -> None:
    prune.l1_unstructured(part, 'weight', 0.3)


def plain_again(part: Any) -> None:
    parametrize.remove_parametrizations(part, 'weight')


def finally_pruned(part: Any) -> None:
    prune.remove(part, 'weight')


@pytest.mark.parametrize(
    ('rewrite', 'undo', 'words'),
    [
        (pruned, finally_pruned, r'masks of pruning here .*prune\.remove\(part'),
        (parametrizations.weight_norm, plain_again, r'parametrised weights here .*remove_parametrizations\(part'),
        (parametrizations.spectral_norm, plain_again, r'parametrised weights here .*remove_parametrizations\(part'),
    ],
)
def test_rewritten_weights(rewrite: Callable[[Any], Any], undo: Callable[[Any], Any], words: str) -> None:
    module = model().eval()
    parts = [block[0].to_out for block in module.transformer.layers]
    for part in parts:
        rewrite(part)
    with pytest.raises(ConversionError, match=words):
        convert.from_torch(module.state_dict(), **TOLD)
    for part in parts:
        undo(part)
    computes_the_same(module.state_dict(), module)


def test_adapters_beside_a_whole_model_are_named() -> None:
    adapters = {'blocks.0.lora_A': torch.ones(4, 16), 'blocks.0.lora_B': torch.ones(4, 16)}
    with pytest.warns(convert.ConversionWarning, match=r'Left aside.*adapters: 2 tensors \(LoRA adapters, '):
        convert.from_torch({'model': model().state_dict(), 'adapters': adapters}, **TOLD)


@pytest.mark.parametrize('names', [('mean', 'std'), ('pixel_mean', 'pixel_std')])
def test_a_normalisation_in_front_is_named(names: tuple[str, str]) -> None:
    state_dict = {f'1.{name}': tensor for name, tensor in model().state_dict().items()}
    state_dict |= {f'0.{name}': torch.rand(3, 1, 1) for name in names}
    words = rf'0: 2 tensors \(0\.{names[0]}, 0\.{names[1]}: a normalisation in front of the model\?'
    with pytest.warns(convert.ConversionWarning, match=words):
        convert.from_torch(state_dict, **TOLD)


def test_another_head_and_another_size_by_the_advice(tmp_path: Any) -> None:
    sizes: Any = {'image_size': 8, 'patch_size': 4, 'num_classes': 5, 'dim': 16, 'depth': 1, 'heads': 2, 'mlp_dim': 20}
    module = perturbed(DeepViT(**sizes))
    others: list[dict[str, Any]] = [{'num_classes': 7}, {'image_size': 16}]
    for other in others:
        ((name, value),) = other.items()
        with pytest.raises(ConversionError, match=rf'from_pretrained\(folder, {name}={value}\)'):
            convert.from_torch(module, **other)
        save_pretrained(tmp_path / name, *convert.from_torch(module))
        with pytest.warns(PretrainedWarning):
            assert getattr(from_pretrained(tmp_path / name, **other)[0], name) == value


@pytest.mark.parametrize(
    ('change', 'advice'),
    [
        (parametrizations.weight_norm, 'remove_parametrizations'),
        (parametrizations.orthogonal, 'remove_parametrizations'),
        (lambda part: Adapted(part), 'merge_and_unload'),
    ],
)
def test_a_live_module_is_told_what_undoes_it(change: Any, advice: str) -> None:
    module: Any = SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20, dim_head=8)
    module.transformer.layers[0][0].to_out = change(module.transformer.layers[0][0].to_out)
    with pytest.raises(convert.ConversionError, match=advice):
        convert.inspect(module)


class Adapted(torch.nn.Module):
    """A layer with the names that peft gives."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({'default': torch.nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({'default': torch.nn.Linear(2, layer.out_features, bias=False)})
