"""The papers' own models compute what their code did: golden files of every step, and PyTorch of our own beside it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax.traverse_util import flatten_dict

import convert
import flax_vit.official_simple_vit
from convert.architectures import architecture_of
from convert.conversion import inspect, place
from convert.proof.flax_side import FlaxSide
from convert.proof.measure import size
from convert.proof.numpy_side import NumpySide
from convert.proof.torch_side import TorchSide
from flax_vit import (
    OfficialDeepViT,
    OfficialSimpleViT,
    features,
    from_nnx,
    from_pretrained,
    named,
    save_pretrained,
    shardings,
    to_nnx,
)
from flax_vit.layers import EPSILON, gelu
from parity_tests.recognition.test_official import OFFICIAL, TOLD, of_big_vision, of_dvit_repo
from parity_tests.support.reference import FLOAT64_BOUND, check, perturbed, relative_error
from parity_tests.support.slow import slow_but

pytestmark = pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # what is assumed, and counters

SIZES: Any = {'num_classes': 7, 'depth': 2, 'heads': 3, 'mlp_dim': 10}
# Every structural variant, of odd sizes.
MODELS: dict[str, Any] = {
    'simple, with pre_logits': OfficialSimpleViT(image_size=(8, 15), patch_size=(4, 5), dim=12, rep_size=9, **SIZES),
    'simple, linear head': OfficialSimpleViT(image_size=6, patch_size=3, dim=12, channels=1, **SIZES),
    'simple, no head': OfficialSimpleViT(image_size=8, patch_size=4, dim=24, **{**SIZES, 'num_classes': 0, 'depth': 1}),
    'deep, patches': OfficialDeepViT(image_size=(8, 15), patch_size=(4, 5), dim=12, **SIZES),
    'deep, stem': OfficialDeepViT(
        image_size=(16, 24), patch_size=8, dim=15, cnn_stem=True, reattention=(1,), scale_adjustment=0.5,
        transform_scale=True, **SIZES,
    ),
    'deep, otherwise': OfficialDeepViT(
        image_size=8, patch_size=(2, 4), dim=6, channels=2, reattention=(0,), qk_scale=0.7, qkv_bias=False,
        layer_norm_epsilon=1e-3, scale_adjustment=2.0, transform_scale=True, **{**SIZES, 'num_classes': 0},
    ),
}  # fmt: skip
FIELDS = ('image_size', 'transform_scale', 'scale_adjustment', 'qk_scale', 'layer_norm_epsilon')


def random_module(model: Any, seed: int = 0) -> torch.nn.Module:
    """PyTorch's module of the model, every parameter and running statistic random."""
    module = perturbed(architecture_of(model).torch_module(model, arguments(model)).double(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith('running_var'):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
        elif name.endswith('running_mean'):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return module


def arguments(model: Any) -> dict[str, Any]:
    names = ('num_classes', 'dim', 'depth', 'heads', 'mlp_dim', 'channels', 'rep_size')
    return {name: getattr(model, name) for name in names if hasattr(model, name)}


def checkpoint(model: Any, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's tensors as the papers' code would have written them."""
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items() if 'num_batches' not in name}
    return architecture_of(model).layouts_of(model)[0].tensors_from_today(tensors)


def told(model: Any) -> dict[str, Any]:
    """What the weights don't tell."""
    found = {name: getattr(model, name) for name in FIELDS if hasattr(model, name)}
    return found | ({'num_classes': 0} if model.num_classes == 0 else {})


@pytest.fixture(params=slow_but({'simple, with pre_logits', 'deep, stem'}, MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def test_the_port_is_proven(model: Any, quick: None) -> None:
    """In float64 outputs to 1e-12 and gradients to 1e-11, every part and every parameter."""
    tensors = checkpoint(model, random_module(model))
    inspection = inspect(tensors, **told(model))
    with jax.enable_x64(True):
        assert convert.inspect(tensors, **told(model)).model == model.clone(param_dtype='float64')
    report = convert.verify(tensors, **told(model), dtype='float64', gradients=True, attention=True, count=2)
    assert report.right, report.verdict
    maps = [len(architecture_of(model).maps_of_block(model, block)) for block in range(model.depth)]
    assert len(report.attention) == sum(maps)
    for theirs, ours in report.attention.values():
        assert relative_error(ours, theirs) <= FLOAT64_BOUND
    assert len(report.rows) == 2 * inspection.model.depth + 3


@pytest.mark.parametrize('name', slow_but('dvit-S', TOLD))
def test_deep_vit_computes_every_step_of_dvit_repo(name: str) -> None:
    with np.load(OFFICIAL / f'{name}.npz') as file:
        golden = dict(file)
    depth = len(json.loads(str(golden['config']))['depth'])
    parts = {'patch_embed': 'to_patch_embedding.8' if name == 'dvit-S' else 'to_patch_embedding.1'}
    parts |= {'norm': 'transformer.norm', 'features': 'to_latent', 'logits': ''}
    for block in range(depth):
        parts[f'mlp.{block}'] = f'transformer.layers.{block}.1'
        parts[f'attention_out.{block}'] = f'transformer.layers.{block}.0'
    adjustment = TOLD[name]['scale_adjustment']
    images = np.moveaxis(golden['images'], 1, 3)
    for side in sides(inspect(of_dvit_repo(name), **TOLD[name])):
        outputs = side.outputs('float64', images, list(parts.values()))
        scales = {theirs: adjustment if '.' in theirs else 1.0 for theirs in parts}  # theirs is not divided yet
        check(
            {
                theirs: relative_error(outputs[ours] * scales[theirs], golden[f'parts/{theirs}'])
                for theirs, ours in parts.items()
            },
            FLOAT64_BOUND,
        )


def test_simple_vit_computes_every_step_of_big_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their position table on both sides: ours is 1e-6 from it at most."""
    with np.load(OFFICIAL / 'bigvision-gap-reference.npz') as file:
        golden = {name.removeprefix('parts/'): array for name, array in file.items()}
    stem = golden['stem'].reshape(2, 15, 24)
    table = (golden['with_posemb'] - stem)[0]
    inspection = inspect(of_big_vision(), image_size=(12, 20))
    model: Any = inspection.model
    np.testing.assert_allclose(model.pos_embedding(), table, rtol=0, atol=1e-6)
    monkeypatch.setattr(OfficialSimpleViT, 'pos_embedding', lambda self, grid=None: table)
    parts = {f'encoder/block0{block}/sa': f'transformer.layers.{block}.0' for block in range(3)}
    parts |= {f'encoder/block0{block}/mlp': f'transformer.layers.{block}.1' for block in range(3)}
    parts |= {'head_input': 'to_latent', 'logits': ''}
    for side in sides(inspection):
        wanted = parts | {'encoded': 'transformer.norm'} if not isinstance(side, NumpySide) else parts
        outputs = side.outputs('float64', golden['images'], ['to_patch_embedding.1', *wanted.values()])
        errors = {theirs: relative_error(outputs[ours], golden[theirs]) for theirs, ours in wanted.items()}
        check(errors | {'stem': relative_error(outputs['to_patch_embedding.1'], stem)}, FLOAT64_BOUND)


def sides(inspection: Any) -> Iterator[Any]:
    """PyTorch's, numpy's where that is the truth, and the port's, in 64-bit mode."""
    with jax.enable_x64(True):
        tensors = inspection.layout.tensors_of_today(inspection.tensors)
        yield TorchSide(inspection, tensors)
        if architecture_of(inspection.model).truth != 'PyTorch':
            yield NumpySide(inspection, tensors)
        yield FlaxSide(inspection.model.clone(image_format='channels_last'), place(inspection))


def test_the_table_is_computed_for_images_of_any_size(float64: None) -> None:
    model: Any = MODELS['simple, with pre_logits'].clone(param_dtype='float64', image_format='channels_last')
    module = random_module(model)
    model, variables = convert.from_torch(checkpoint(model, module), **told(model))
    larger = model.clone(image_size=(12, 10))
    images = np.random.default_rng(0).standard_normal((2, 12, 10, 3))
    np.testing.assert_array_equal(model.apply(variables, images), larger.apply(variables, images))


def test_training_moves_the_running_statistics_as_pytorch_does(float64: None) -> None:
    """Those of the batch are computed with; the running variance is moved by the unbiased one, by a tenth."""
    model: Any = MODELS['deep, stem']
    module = random_module(model)
    model, variables = convert.from_torch(checkpoint(model, module), **told(model))
    images = np.random.default_rng(0).standard_normal((3, 16, 24, 3))
    apply = jax.jit(model.apply, static_argnames=('train', 'mutable'))
    logits, changed = apply(variables, images, train=True, mutable='batch_stats')
    theirs = module.train()(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    after = (
        architecture_of(model)
        .layouts_of(model)[0]
        .tensors_from_today({name: tensor.numpy() for name, tensor in module.state_dict().items()})
    )
    ours = convert.to_torch(model, {**variables, **changed})
    moved = {name: relative_error(ours[name], after[name]) for name in ours if 'running' in name}
    assert len(moved) == 6
    check(moved | {'logits': relative_error(logits, theirs)}, FLOAT64_BOUND)
    still = convert.to_torch(model, variables)
    assert all(not np.array_equal(still[name], ours[name]) for name in moved)


def test_what_drops_out_in_training() -> None:
    """Stochastic depth leaves whole branches of an image out, none of the first block's, and scales the others up."""
    drop = flax_vit.official_deep_vit.DropPath(0.25)
    x = jnp.ones((400, 2, 3))
    kept: Any = drop.apply({}, x, train=True, rngs={'dropout': jax.random.key(0)})
    assert set(np.unique(kept).tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert np.all(np.asarray(kept == kept[:, :1, :1]))
    assert 0.65 < np.mean(kept > 0) < 0.85
    np.testing.assert_array_equal(drop.apply({}, x, train=False), x)
    model = OfficialDeepViT(image_size=8, patch_size=4, dim=12, drop_path=0.4, **{**SIZES, 'depth': 3})
    images = np.ones((1, 8, 8, 3), np.float32)
    variables = model.init(jax.random.key(0), images)
    seen: dict[str, float] = {}

    def note(call: Any, given: Any, keywords: Any, context: Any) -> Any:
        if isinstance(context.module, flax_vit.official_deep_vit.DropPath):
            seen['/'.join(context.module.path)] = context.module.rate
        return call(*given, **keywords)

    with nn.intercept_methods(note):
        rngs = {'dropout': jax.random.key(1)}
        model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])
    assert seen == {
        f'transformer/layers_{block}_{part}/drop_path': pytest.approx(0.2 * block)
        for block in range(3)
        for part in range(2)
    }


# What is done wrong, and what `verify` says of it.
SLIPS: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "PyTorch's epsilon in SimpleViT": ('simple, with pre_logits', {'EPSILON': EPSILON}, r'epsilon of 1e-05 .* 1e-06'),
    'erf in SimpleViT': (
        'simple, linear head',
        {'FeedForward.ACTIVATION': staticmethod(gelu)},
        'GELU by the error function .* instead of tanh',
    ),
    'another epsilon in DeepViT': ('deep, patches', {'layer_norm_epsilon': 1e-5}, r'epsilon of 1e-05 .* 1e-06'),
    'no scale after re-attention': (
        'deep, otherwise',
        {'transform_scale': False},
        'without a scale after re-attention',
    ),
    'another scale_adjustment': ('deep, stem', {'scale_adjustment': 1.0}, 'with scale_adjustment=1.0'),
}


@pytest.mark.parametrize('slip', slow_but('another scale_adjustment', SLIPS))
def test_causes_are_named(slip: str, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    name, wrong, words = SLIPS[slip]
    right: Any = MODELS[name]
    tensors = checkpoint(right, random_module(right))
    model: Any
    model, variables = convert.from_torch(tensors, **told(right))
    for field, value in wrong.items():
        if hasattr(model, field):
            model = model.clone(**{field: value})
        else:
            monkeypatch.setattr(f'flax_vit.official_simple_vit.{field}', value)
    report = convert.verify(tensors, converted=(model, variables), **told(right), dtype='float64', count=2)
    assert not report.right
    assert any(re.search(words, cause) for cause in report.causes), report.causes


@pytest.mark.slow
def test_padding_of_the_stem_is_told(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    right: Any = MODELS['deep, stem']
    tensors = checkpoint(right, random_module(right))
    ported = convert.from_torch(tensors, **told(right))
    convolution = jax.lax.conv_general_dilated
    monkeypatch.setattr(
        jax.lax, 'conv_general_dilated', lambda x, k, strides, _, **rest: convolution(x, k, strides, 'SAME', **rest)
    )
    report = convert.verify(tensors, converted=ported, **told(right), dtype='float64', count=2)
    assert report.causes == ["patch embedding: matches padded as 'SAME' instead of by 3 on every side"]


@pytest.mark.parametrize(('name', 'part'), [('deep, stem', 'patch embedding'), ('deep, patches', 'block 0 attention')])
def test_the_statistics_of_a_batch_are_told(name: str, part: str, quick: None) -> None:
    """Of all its images: no single one tells them."""
    right: Any = MODELS[name]
    tensors = checkpoint(right, random_module(right))
    ported = convert.from_torch(tensors, **told(right))

    def of_the_batch(call: Any, given: Any, keywords: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, flax_vit.official_deep_vit.BatchNorm):
            return call(*given, **keywords)
        features = jnp.moveaxis(given[0], module.axis, -1)
        others = tuple(range(features.ndim - 1))
        deviation = jnp.sqrt(features.var(others) + flax_vit.official_deep_vit.BATCH_NORM_EPSILON)
        scale: Any = module.get_variable('params', 'scale')
        bias: Any = module.get_variable('params', 'bias')
        return jnp.moveaxis((features - features.mean(others)) / deviation * scale + bias, -1, module.axis)

    with nn.intercept_methods(of_the_batch):
        report = convert.verify(tensors, converted=ported, **told(right), dtype='float64', count=3)
    assert report.causes == [f'{part}: matches with the statistics of the batch in BatchNorm (train=True?)']


def test_numpy_says_nothing_of_what_is_not_finite() -> None:
    right: Any = MODELS['simple, with pre_logits']
    tensors = checkpoint(right, random_module(right))
    tensors['embedding/bias'] = np.full_like(tensors['embedding/bias'], np.inf)
    report = convert.verify(tensors, **told(right), dtype='float16', count=1)
    assert report.causes == [
        "patch embedding: the source's own output is not finite; the weights or the images hold NaN or infinity"
    ]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_numpy_rounds_as_the_port_does(dtype: str) -> None:
    """Where numpy is the truth, its own rounding is the measure: neither so coarse nor so fine that it is none."""
    right: Any = MODELS['simple, with pre_logits'].clone(dim=60, depth=6, mlp_dim=90)
    tensors = checkpoint(right, random_module(right))
    report = convert.verify(tensors, **told(right), dtype=dtype, count=4)
    assert report.right, report.verdict
    assert 'what big_vision does' in report.verdict
    assert 1 / 3 <= max(row.ratio for row in report.rows) <= 3
    inspection = report.inspection
    pytorch = TorchSide(inspection, inspection.layout.tensors_of_today(inspection.tensors))
    parts = [row.name for row in report.rows]
    exact, rounded = (pytorch.outputs(each, report.inputs, parts) for each in ('float64', dtype))
    for row in report.rows:
        theirs = size(rounded[row.name] - exact[row.name]) / size(exact[row.name])
        assert 1 / 3 <= row.torch / theirs <= 3, row.label


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'path', 'words'), [
    ('simple, with pre_logits', ('transformer', 'layers_0_0', 'query', 'kernel'), r'to_qkv\.weight: not the source'),
    ('deep, stem', ('transformer', 'layers_1_0', 'reatten_matrix', 'kernel'), r'reatten_matrix\.weight transposed'),
    ('deep, patches', ('to_patch_embedding_1', 'kernel'), "not the source's"),
])  # fmt: skip
def test_wrong_parameters_are_named(name: str, path: tuple[str, ...], words: str, quick: None) -> None:
    right: Any = MODELS[name]
    tensors = checkpoint(right, random_module(right))
    model, variables = convert.from_torch(tensors, **told(right))
    *outer, last = path
    node = variables['params']
    for part in outer:
        node = node[part]
    node[last] = node[last].swapaxes(-1, -2) if last == 'kernel' and 'reatten' in path[-2] else node[last] + 0.1
    report = convert.verify(tensors, converted=(model, variables), **told(right), dtype='float64', count=2)
    assert not report.right
    assert any(re.search(words, cause) for cause in report.causes), report.causes


@pytest.mark.parametrize('name', ['simple, with pre_logits', 'deep, stem'])
def test_they_are_at_home_in_flax_vit(name: str, tmp_path: Any) -> None:
    right: Any = MODELS[name]
    model: Any
    model, variables = convert.from_torch(checkpoint(right, random_module(right)), **told(right))
    images = np.random.default_rng(0).standard_normal((2, *right.image_size, 3)).astype(np.float32)
    save_pretrained(tmp_path / 'folder', model, variables)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ('data', 'model'))
    again: Any
    again, spread = from_pretrained(tmp_path / 'folder', mesh=mesh)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, spread, variables)
    logits = jax.jit(again.apply)(spread, images)
    seen = features(model, variables, images, attention=True)
    np.testing.assert_allclose(seen.logits, logits, rtol=1e-5, atol=1e-5)
    assert list(seen.attention) == [0, 1]
    assert list(seen.reattention) == ([1] if name == 'deep, stem' else [])
    module = to_nnx(model, variables)
    np.testing.assert_allclose(module(images), logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(module), variables)
    split = {'/'.join(path): each.spec for path, each in flatten_dict(shardings(variables, mesh)).items()}
    assert split['params/head/kernel'] == jax.P(None, 'model')
    if name != 'deep, stem':
        assert split['params/transformer/layers_0_0/query/kernel'] == jax.P(None, 'model', None)
        assert split['params/transformer/layers_0_0/query/bias'] == jax.P('model', None)
        assert split['params/transformer/layers_0_0/out/kernel'] == jax.P('model', None, None)
    if name == 'deep, stem':
        module.train()
        module(images)
        before, after = (jax.tree.leaves(each['batch_stats']) for each in (variables, from_nnx(module)))
        assert all((old != new).any() for old, new in zip(before, after, strict=True))
    other: Any
    with pytest.warns(flax_vit.PretrainedWarning):
        other, resized = from_pretrained(tmp_path / 'folder', num_classes=5, image_size=(32, 40))
    assert other.apply(resized, jnp.ones((1, 32, 40, 3))).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['deepvit_L_384', 'deepvit_S', 'deepvit_patch16_224_re_attn_32b', 'official_simple_vit_s16']
)
def test_models_of_full_size_are_converted_and_run(name: str) -> None:
    model: Any = named(name, num_classes=10)
    module = random_module(model).float()
    source = checkpoint(model, module)
    again: Any
    again, variables = convert.from_torch(source)
    assert again == model
    images = np.random.default_rng(0).standard_normal((1, model.image_size, model.image_size, 3), np.float32)
    logits = jax.jit(again.apply)(variables, images)
    with torch.no_grad():
        theirs = module(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    # Roundings of float32 through up to 64 layers; parity itself is held in float64, above.
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
