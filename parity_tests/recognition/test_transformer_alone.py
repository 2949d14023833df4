"""The Transformer alone: found under any beginning, in models that are otherwise unknown, converted and proven."""

import pathlib
import re
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import convert
import flax_vit
from convert import ConversionError
from convert.architectures import layouts_of_all, transformers
from convert.architectures.architecture import Layout
from parity_tests.golden.make import FOLDER
from parity_tests.support.reference import perturbed
from parity_tests.support.slow import slow_but
from parity_tests.support.small_models import assert_equal, variables_of

pytestmark = pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # of dropout, of the rest

SIZES = {'dim': 12, 'depth': 3, 'heads': 2, 'dim_head': 5, 'mlp_dim': 16}
CLASSES = [architecture.torch_classes[0] for architecture in transformers()]


def build(name: str, **sizes: Any) -> Any:
    """A torch Transformer by its class's full name, with random weights."""
    package, _, class_name = name.rpartition('.')
    return perturbed(getattr(import_module(package), class_name)(**{**SIZES, **sizes}).eval())


class Model(torch.nn.Module):
    """As people build them: vit-pytorch's Transformer among parts of their own."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = torch.nn.ModuleDict({'blocks': transformer, 'tokenizer': torch.nn.Linear(7, 12)})
        self.head = torch.nn.Linear(12, 2)


def tokens(count: int = 7, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, count, dim))


def difference(module: torch.nn.Module, model: Any, variables: Any, x: np.ndarray) -> float:
    """Between PyTorch and Flax in float64, relative to the largest number."""
    with jax.enable_x64(True), torch.no_grad():
        wide = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), variables)
        port = model.clone(dtype='float64', param_dtype='float64', precision='highest').apply(wide, x)
        truth = module.double()(torch.from_numpy(x)).numpy()
    return float(np.abs(np.asarray(port) - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize('name', CLASSES)
def test_inside_a_model_of_ones_own(name: str) -> None:
    module = build(name)
    model = Model(module)
    source = {'epoch': 3, 'state_dict': {f'module.net.{key}': value for key, value in model.state_dict().items()}}
    with pytest.raises(ConversionError, match=r"part='transformer' converts it alone(.|\n)*net\.encoder\.blocks"):
        convert.from_torch(source)
    aside = convert.inspect(source, part='transformer').unwrapped.left_aside
    assert {group.rpartition('.')[2]: what for group, what in aside.items()} == {
        'tokenizer': '2 tensors', 'head': '2 tensors', 'epoch': '3'
    }  # fmt: skip
    port, variables = convert.from_torch(source, part='transformer', heads=2)
    assert (port.heads, port.dim_head, port.depth, port.mlp_dim) == (2, 5, 3, 16)
    assert difference(module, port, variables, tokens()) < 1e-12
    assert_equal(convert.from_torch(source, part='transformer', heads=2, key='state_dict.module')[1], variables)


@pytest.mark.parametrize('name', CLASSES)
def test_a_live_model_tells_the_heads(name: str) -> None:
    module = build(name)
    port, variables = convert.from_torch(Model(module), part='transformer')
    assert (port.heads, port.dim_head) == (2, 5)
    assert difference(module, port, variables, tokens()) < 1e-12
    two = torch.nn.ModuleList([build(name), build(name)])
    with pytest.raises(ConversionError, match=r"It holds 2, .*module.get_submodule\('0'\)") as refused:
        convert.from_torch(two, part='transformer')
    calls = re.findall(r"module\.get_submodule\('\d'\)", str(refused.value))
    for call, own in zip(calls, two, strict=True):
        again, kept = convert.from_torch(eval(call, {'module': two}))
        assert difference(own, again, kept, tokens()) < 1e-12


@pytest.mark.parametrize('name', slow_but(CLASSES[0], CLASSES))
def test_nothing_but_a_transformer(name: str, tmp_path: pathlib.Path) -> None:
    """Needs no `part`; and has all that a whole model has."""
    module = build(name, heads=3)
    torch.save(module.state_dict(), tmp_path / 'transformer.pt')
    source = tmp_path / 'transformer.pt'
    report = convert.verify(source, heads=3, gradients=True)
    assert report.right, report.verdict
    assert report.rows[-1].label == 'tokens'
    port, variables = convert.from_torch(source, heads=3)
    slipped = jax.tree.map(lambda array: array * 1.01, variables)
    assert not convert.verify(source, heads=3, converted=(port, slipped)).right
    back = {key: torch.from_numpy(array) for key, array in convert.to_torch(port, variables).items()}
    assert {key: value.tolist() for key, value in back.items()} == {
        key: value.float().tolist() for key, value in module.state_dict().items()
    }

    flax_vit.save_pretrained(tmp_path / 'folder', port, variables)
    again, kept = flax_vit.from_pretrained(tmp_path / 'folder')
    assert again == port
    assert_equal(kept, variables)
    x = tokens().astype(np.float32)
    outputs: Any = port.apply(variables, x)
    np.testing.assert_allclose(flax_vit.to_nnx(port, variables)(x), outputs, rtol=1e-5, atol=1e-5)
    scanned = port.clone(scan_layers=True, remat=True)
    stacked = {'params': flax_vit.stack_layers(variables['params'])}
    np.testing.assert_allclose(np.asarray(scanned.apply(stacked, x)), outputs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r'tokens of shape \(batch, tokens, 12\), not \(2, 7, 11\)'):
        port.apply(variables, x[..., :11])


def test_as_many_tokens_as_numbers_in_each() -> None:
    """Nothing is taken for an image's axis."""
    module = build(CLASSES[0], dim=8)
    assert convert.verify(module.state_dict(), heads=2, images=tokens(8, 8).astype(np.float32)).right


def test_the_transformer_of_another_model_is_told() -> None:
    one, other = (build(name).state_dict() for name in CLASSES[:2])
    with pytest.raises(ConversionError, match=r'is a \w+\.transformer, but a state dict holds a \w+\.transformer'):
        convert.verify(one, heads=2, converted=convert.from_torch(other, heads=2))


def test_only_what_is_asked_for() -> None:
    """A key at which there is no Transformer is not answered with one that is elsewhere."""
    source = {'a': build(CLASSES[0]).state_dict(), 'b': {'norm.weight': torch.ones(12)}}
    assert convert.inspect({'a': source['a']}, heads=2).unwrapped.address == 'a'
    for key in ('b', 'c'):
        with pytest.raises(ConversionError):
            convert.inspect(source, key=key, heads=2)


@pytest.mark.parametrize('name', CLASSES)
def test_on_a_mesh_of_explicit_axes(name: str) -> None:
    port, variables = convert.from_torch(build(name).state_dict(), heads=2)
    x = tokens().astype(np.float32)
    expected: Any = port.apply(variables, x)
    mesh = jax.make_mesh((1, 1), ('data', 'model'))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    placed = jax.device_put((variables, x), everywhere)
    np.testing.assert_allclose(jax.jit(port.apply)(*placed), expected, rtol=1e-5, atol=1e-5)


WITH_TRANSFORMER = [layout for layout in layouts_of_all() if hasattr(layout.model, 'TRANSFORMER')]


@pytest.mark.parametrize('layout', WITH_TRANSFORMER, ids=lambda layout: layout.id)
def test_out_of_a_whole_model(layout: Layout) -> None:
    """Under the names of every release, and where the whole has another head than ours: the arrays of the whole."""
    sizes = {'image_size': 8, 'patch_size': 4, 'num_classes': 16, 'dim': 16, 'depth': 2, 'heads': 2, 'mlp_dim': 20}
    model = layout.model(**sizes, dim_head=8, **layout.fields)
    variables = variables_of(model)
    whole = convert.to_torch(model, variables, layout=layout.id) | {'another_head.weight': np.zeros((3, 3), np.float32)}
    release = layout.releases.split()[0]
    part, alone = convert.from_torch(whole, part='transformer', release=release, heads=2, dim_head=8)
    assert part == model.transformer_alone()
    assert_equal(alone['params'], variables['params']['transformer'])


def test_what_part_is() -> None:
    with pytest.raises(ConversionError, match="part must be 'transformer', or left out for a whole model, not 'head'"):
        convert.inspect({}, part='head')
    with pytest.raises(ConversionError, match=r'Transformer of the ViT(.|\n)*Give these arguments:(.|\n)*heads=2 if'):
        convert.from_torch(build(CLASSES[0]).state_dict())


@pytest.mark.parametrize('name', ['S0-0.40.2', 'V4-0.16.0'])
def test_one_without_a_final_norm_is_verified(name: str) -> None:
    """As it was before 1.4.0: the norm was in the head."""
    told: dict[str, Any] = {'part': 'transformer', 'release': '0.40.2', 'heads': 3}
    report = convert.verify(FOLDER / f'{name}.pt', **told, dtype='float64', count=2)
    assert report.right, report.verdict
