"""Every layout of names that vit-pytorch's releases wrote: recognised, computed as that release did, written back.

The golden files were made by the releases' own source (golden/make.py); test_releases.py fetches the releases anew.
"""

import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

import convert
from convert import ConversionError
from convert.architectures import ARCHITECTURES, layouts_of_all
from convert.architectures.architecture import Architecture, Layout
from convert.proof.torch_side import TorchSide
from convert.recognition.layouts import leaves, template
from convert.recognition.unwrap import unwrap
from flax_vit import DeepViT, SimpleViT
from parity_tests.golden.make import FIELDS_OF, FOLDER, GOLDEN
from parity_tests.support.reference import FLOAT64_BOUND, relative_error

CONVERTED = [name for name in GOLDEN if not name.startswith('S2')]
# What the weights don't tell.
ASKED = {
    'SimpleViT': ('image_size', 'patch_size', 'heads', 'channels'),
    'DeepViT': ('channels', 'heads', 'pool', 'dropout', 'emb_dropout'),
}
RELEASES = {
    'S0': '0.35.0 to 0.40.2', 'B-cos': '0.35.0 to 0.40.2, under the names of B-cos/B-cos-v2', 'S1': '1.0.0 to 1.2.9',
    'S3': '1.4.1 and later', 'D0': '0.9.0 to 0.40.2', 'D1': '1.0.0 to 1.4.2', 'D2': '1.4.3 and later',
}  # fmt: skip
# Every layout that can hold what the model computes, the newest first.
ABLE = {'S0': ['S0', 'B-cos'], 'S1': ['S1'], 'S3': ['S3'], 'D0': ['D0'], 'D1': ['D2', 'D1'], 'D2': ['D2', 'D1']}
ABLE['B-cos'] = ABLE['S0']


def layout_of(name: str) -> str:
    return name if name == 'B-cos' else name.partition('-')[0]


ONE_OF_EACH = {layout_of(name): name for name in CONVERTED}.values()


def fields_of(name: str) -> dict[str, Any]:
    """What has to be given to convert a golden file."""
    model = GOLDEN[name][1]
    return {field: FIELDS_OF[model][field] for field in ASKED[model]}


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a golden file, as our own reader gives them; its images, logits and features."""
    tensors = dict(convert.inspect(FOLDER / f'{name}.pt', **fields_of(name)).tensors)
    with np.load(FOLDER / f'{name}.npz') as arrays:
        return tensors, dict(arrays)


def bits(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize('name', CONVERTED)
def test_a_release_is_recognised_and_computed(name: str, float64: None) -> None:
    inspection = convert.inspect(FOLDER / f'{name}.pt', **fields_of(name))
    assert inspection.layout.id == layout_of(name)
    assert inspection.layout.releases == RELEASES[layout_of(name)]
    model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields_of(name), param_dtype='float64')
    old = {'patch_norm': name[0:2] not in ('S0', 'B-', 'D0')}
    old |= {'norm_after_mean': name[0:2] in ('S0', 'B-', 'S1')} if isinstance(model, SimpleViT) else {}
    fields = FIELDS_OF[GOLDEN[name][1]] | old
    assert model == type(model)(**fields, param_dtype=np.dtype('float64'))
    _, truth = golden(name)
    assert relative_error(jax.jit(model.apply)(variables, truth['images']), truth['logits']) <= FLOAT64_BOUND


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_verify_compares_with_what_the_release_computed(name: str) -> None:
    """The reference is put together from today's parts: here it is held against the old release's own outputs."""
    report = convert.verify(FOLDER / f'{name}.pt', **fields_of(name), count=2)
    assert report.right
    _, truth = golden(name)
    images = truth['images']
    last = images if images.shape[-1] == report.inspection.model.channels else images.transpose(0, 2, 3, 1)
    inspection = report.inspection
    tensors = {inspection.layout.to_today(name): tensor for name, tensor in inspection.tensors.items()}
    outputs = TorchSide(inspection, tensors).outputs('float64', last, [''])
    assert relative_error(outputs[''], truth['logits']) <= FLOAT64_BOUND


@pytest.mark.parametrize('name', [*ONE_OF_EACH, 'S2-1.4.0'])
def test_the_features_of_a_release(name: str, float64: None) -> None:
    with np.load(FOLDER / f'{name}.npz') as truth:
        images, features = truth['images'], truth['features']
    if GOLDEN[name][1] == 'DeepViT':
        assert features.shape == (len(images), 8)
    fields = fields_of(name) | {'num_classes': 0, 'param_dtype': 'float64'}
    with pytest.warns(convert.ConversionWarning, match=r'Left aside.*_head: (4|2) tensors'):
        model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields)
    assert relative_error(jax.jit(model.apply)(variables, images), features) <= FLOAT64_BOUND


def test_the_golden_releases_differ_where_they_should() -> None:
    """Two layouts with the same weights, the same images and another function: a golden file would show a mix-up."""
    logits = {name: golden(name)[1]['logits'] for name in CONVERTED}
    assert np.array_equal(logits['B-cos'], logits['S0-0.40.2'])
    for one, other in [('S0-0.35.0', 'S1-1.2.9'), ('S1-1.2.9', 'S3-1.4.1'), ('D0-0.40.2', 'D1-1.4.2')]:
        assert relative_error(logits[one], logits[other]) > 1e-2


def test_a_layout_of_an_older_function_computes_another(float64: None) -> None:
    """The failing twin: renaming S1's head norm to S3's, which loads cleanly, is seen."""
    tensors, truth = golden('S1-1.2.9')
    renamed = {
        name.replace('linear_head.0.', 'transformer.norm.').replace('linear_head.1.', 'linear_head.'): tensor
        for name, tensor in tensors.items()
    }
    model, variables = convert.from_torch(renamed, **fields_of('S3-1.4.1'), param_dtype='float64')
    assert relative_error(jax.jit(model.apply)(variables, truth['images']), truth['logits']) > 1e-3


def test_1_4_0_is_refused_with_the_reason() -> None:
    with pytest.raises(ConversionError, match=r'1\.4\.0, whose head is by mistake a LayerNorm.*linear_head\.weight'):
        convert.inspect(FOLDER / 'S2-1.4.0.pt')


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_to_torch_writes_the_newest_layout_or_the_one_asked_for(name: str) -> None:
    tensors, _ = golden(name)
    model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields_of(name))
    able = ABLE[layout_of(name)]
    newest = convert.to_torch(model, variables)
    assert convert.inspect(newest, **fields_of(name)).layout.id == able[0]
    for layout in (row.id for row in layouts_of_all()):
        if layout not in able:
            with pytest.raises(ConversionError, match=f'layout={layout!r} does not compute.*{able[0]}'):
                convert.to_torch(model, variables, layout=layout)
            continue
        written = convert.to_torch(model, variables, layout=layout)
        assert convert.inspect(written, **fields_of(name)).layout.id == layout
        if layout == layout_of(name):
            assert bits(written) == bits(tensors)
        else:
            again = convert.from_torch(written, **fields_of(name))
            assert bits(convert.to_torch(*again, layout=layout_of(name))) == bits(tensors)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_without_the_head_the_way_back_is_bit_for_bit(name: str) -> None:
    tensors, _ = golden(name)
    body = {key: tensor for key, tensor in tensors.items() if not key.startswith(('linear_head.', 'mlp_head.'))}
    with pytest.raises(ConversionError, match=r'Only the head, (linear|mlp)_head, is missing: num_classes=0'):
        convert.from_torch(body, **fields_of(name))
    model, variables = convert.from_torch(body, **fields_of(name), num_classes=0)
    assert model.num_classes == 0
    assert bits(convert.to_torch(model, variables, layout=layout_of(name))) == bits(body)


def test_an_unknown_layout_is_answered_with_those_there_are() -> None:
    model, variables = convert.from_torch(FOLDER / 'D2-1.4.3.pt', **fields_of('D2-1.4.3'))
    with pytest.raises(ConversionError, match=r"layout='D9'.*D2 \(DeepViT of vit-pytorch 1\.4\.3 and later\), D1"):
        convert.to_torch(model, variables, layout='D9')


@pytest.mark.parametrize('layout', layouts_of_all(), ids=lambda layout: layout.id)
def test_renaming_goes_both_ways(layout: Layout) -> None:
    """Also in models of more than ten blocks, where a number has two digits."""
    theirs = leaves(layout, depth=12)
    assert {layout.to_today(name) for name in theirs} == {rule.name for rule, _ in theirs.values()}
    assert [layout.from_today(rule.name) for rule, _ in theirs.values()] == list(theirs)
    assert {re.sub(r'(?<=\.layers\.|encoder_)\d+', '#', name) for name in theirs} == template(layout).keys()


def test_a_missing_block_is_said_and_not_skipped() -> None:
    tensors, _ = golden('D2-1.4.3')
    gap = {name.replace('layers.1.', 'layers.2.'): tensor for name, tensor in tensors.items()}
    with pytest.raises(ConversionError, match=r'- transformer\.layers\.1\.0\.norm\.weight 8: missing'):
        convert.inspect(gap)
    none = {name: tensor for name, tensor in tensors.items() if '.layers.' not in name}
    for with_head in (True, False):
        with pytest.raises(ConversionError, match=r'- transformer\.layers\.0\.0\.norm\.weight 8: missing'):
            unwrap(none, head=with_head)


def test_every_layout_has_a_golden_file_and_fields_of_its_model() -> None:
    assert {layout_of(name) for name in CONVERTED} == {layout.id for layout in layouts_of_all()}
    assert {layout.model for layout in layouts_of_all()} == {SimpleViT, DeepViT}


@pytest.mark.parametrize('architecture', ARCHITECTURES, ids=lambda architecture: architecture.model.__name__)
def test_a_size_of_the_probe_tells_what_an_axis_holds(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two axes are alike; and another probe says the same of every parameter."""
    layout = architecture.layouts[0]
    quantities = architecture.quantities(layout.model(**architecture.probe, depth=1))
    assert len({axis.size(quantities) for axis in architecture.axes}) == len(architecture.axes)
    expected = leaves(layout, depth=2)
    other = {'image_size': 33, 'patch_size': 3, 'channels': 5, 'dim': 28, 'mlp_dim': 37, 'num_classes': 41}
    monkeypatch.setattr(type(architecture), 'probe', other | {'heads': 11, 'dim_head': 13})
    assert leaves(layout, depth=2) == expected


def test_a_model_of_somebody_else_goes_nowhere() -> None:
    class Own(SimpleViT):
        pass

    own = Own(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=8)
    for model in (own, nn.Dense(3)):
        with pytest.raises(ConversionError, match=rf'A {type(model).__name__} is no SimpleViT or DeepViT of flax_vit'):
            convert.to_torch(model, {'params': {}})
