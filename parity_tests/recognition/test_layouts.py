"""Every layout of names that vit-pytorch's releases wrote: recognised, computed as that release did, written back.

The golden files were made by the releases' own source (golden/make.py); test_releases.py fetches the releases anew.
"""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from flax import linen as nn
from vit_pytorch import deepvit, simple_vit, vit

import convert
from convert import ConversionError, recognition
from convert.architectures import ARCHITECTURES, architecture_of, layouts_of_all
from convert.architectures.architecture import Architecture, Layout
from convert.proof.torch_side import TorchSide
from convert.recognition.layouts import leaves, template
from convert.recognition.unwrap import unwrap
from flax_vit import SimpleViT, ViT
from flax_vit.architectures import MODELS
from parity_tests.golden.make import FOLDER, GOLDEN, arguments_of
from parity_tests.support.reference import FLOAT64_BOUND, quickly, relative_error

OF_VIT_PYTORCH = [layout for layout in layouts_of_all() if layout.source == 'vit-pytorch']
CONVERTED = [name for name in GOLDEN if not name.startswith('S2')]
# What the weights don't tell.
ASKED = {
    'SimpleViT': ('image_size', 'patch_size', 'heads', 'channels'),
    'DeepViT': ('channels', 'heads', 'pool', 'dropout', 'emb_dropout'),
    'ViT': ('image_size', 'channels', 'heads', 'pool', 'dropout', 'emb_dropout'),
}
RELEASES = {
    'S0': '0.35.0 to 0.40.2', 'B-cos': '0.35.0 to 0.40.2, under the names of B-cos/B-cos-v2', 'S1': '1.0.0 to 1.2.9',
    'S3': '1.4.1 and later', 'S3R': '1.5.0 and later, with register tokens',
    'S3Q': '1.4.2 and later, with query-key normalisation',
    'D0': '0.9.0 to 0.40.2', 'D1': '1.0.0 to 1.4.2', 'D2': '1.4.3 and later',
    'V0a': '0.2.0', 'V0b': '0.2.1', 'V0': '0.2.2 to 0.2.7', 'V1': '0.3.0 to 0.6.6', 'V2': '0.6.7 to 0.6.8',
    'V3': '0.7.0 to 0.9.3', 'V4': '0.10.1 to 0.40.2', 'V5': '1.0.0 to 1.2.9', 'V6': '1.4.0 to 1.16.0', 'V7': '1.16.0',
    'V8': '1.16.1 and later',
}  # fmt: skip
# Every layout that can hold what the model computes, the newest first.
ABLE = {
    'S0': ['S0', 'B-cos'],
    'S1': ['S1'],
    'S3': ['S3'],
    'S3R': ['S3R'],
    'S3Q': ['S3Q'],
    'D0': ['D0'],
    'D1': ['D2', 'D1'],
    'D2': ['D2', 'D1'],
}
ABLE |= {'B-cos': ABLE['S0'], 'V1': ['V1'], 'V5': ['V5'], 'V6': ['V6']}  # the ViTs' pool is the mean
ABLE |= {name: ['V0', 'V0b', 'V0a'] for name in ('V0', 'V0b', 'V0a')}
ABLE |= {name: ['V4', 'V3', 'V2'] for name in ('V2', 'V3', 'V4')}
ABLE |= {name: ['V8', 'V7'] for name in ('V7', 'V8')}
# The fields for what releases of ViT computed differently.
OLD_VIT: dict[str, dict[str, Any]] = {'V8': {}, 'V7': {}, 'V6': {'class_token': True}}
OLD_VIT['V5'] = OLD_VIT['V6'] | {'norm_after_mean': True}
OLD_VIT |= dict.fromkeys(('V2', 'V3', 'V4'), OLD_VIT['V5'] | {'patch_norm': False})
OLD_VIT['V1'] = OLD_VIT['V4'] | {'scale_by_dim': True}
OLD_VIT |= dict.fromkeys(('V0', 'V0b', 'V0a'), OLD_VIT['V1'] | {'hidden_head': True})


def layout_of(name: str) -> str:
    return name if name == 'B-cos' else name.partition('-')[0]


def arguments(name: str) -> dict[str, Any]:
    """What the release was built with."""
    version, model, *_ = GOLDEN[name]
    return arguments_of(model, version)


ONE_OF_EACH = {layout_of(name): name for name in CONVERTED}.values()


def fields_of(name: str, *, head: bool = True) -> dict[str, Any]:
    """What has to be given to convert a golden file, or without the head."""
    known = {'dropout': 0.0, 'emb_dropout': 0.0, **arguments(name)}  # at first ViT had no dropout
    fields = {field: known.get(field) for field in ASKED[GOLDEN[name][1]]}
    fields = {field: value for field, value in fields.items() if value is not None}
    old = OLD_VIT.get(layout_of(name), {})
    # V1 and V2 have the same names, and what is V3 may be written under V2's; without a head so has V0.
    if layout_of(name) in ('V1', 'V2', 'V3', 'V4') or (layout_of(name) == 'V0' and not head):
        fields |= {'scale_by_dim': old.get('scale_by_dim', False)}
        fields |= {} if head else {'hidden_head': old.get('hidden_head', False), 'pool': fields.get('pool', 'cls')}
    return fields if head else fields | {'num_classes': 0}


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a golden file, as our own reader gives them; its images, logits and features."""
    tensors = dict(convert.inspect(FOLDER / f'{name}.pt', **fields_of(name)).tensors)
    with np.load(FOLDER / f'{name}.npz') as arrays:
        return tensors, dict(arrays)


def bits(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items() if array.size}


@pytest.mark.parametrize('name', CONVERTED)
def test_a_release_is_recognised_and_computed(name: str, float64: None) -> None:
    inspection = convert.inspect(FOLDER / f'{name}.pt', **fields_of(name))
    assert inspection.layout.id == layout_of(name)
    assert inspection.layout.releases == RELEASES[layout_of(name)]
    model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields_of(name), param_dtype='float64')
    old = OLD_VIT.get(layout_of(name)) or {'patch_norm': name[0:2] not in ('S0', 'B-', 'D0')}
    old |= {'norm_after_mean': name[0:2] in ('S0', 'B-', 'S1')} if isinstance(model, SimpleViT) else {}
    old |= {'S3R': {'num_register_tokens': 4}, 'S3Q': {'qk_norm': True, 'num_classes': 8}}.get(layout_of(name), {})
    fields = {'dim_head': 4} | arguments(name) | old  # ViT's first releases had dim / heads
    assert model == type(model)(**fields, param_dtype=np.dtype('float64'))
    _, truth = golden(name)
    assert relative_error(quickly(model.apply)(variables, truth['images']), truth['logits']) <= FLOAT64_BOUND


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_verify_compares_with_what_the_release_computed(name: str) -> None:
    """The reference is put together from today's parts: here it is held against the old release's own outputs."""
    report = convert.verify(FOLDER / f'{name}.pt', **fields_of(name), count=2, dtype='float64')
    assert report.right
    _, truth = golden(name)
    images = truth['images']
    last = images if images.shape[-1] == report.inspection.model.channels else images.transpose(0, 2, 3, 1)
    inspection = report.inspection
    tensors = inspection.layout.tensors_of_today(inspection.tensors)
    outputs = TorchSide(inspection, tensors).outputs('float64', last, [''])
    assert relative_error(outputs[''], truth['logits']) <= FLOAT64_BOUND


@pytest.mark.slow
@pytest.mark.parametrize('name', [*ONE_OF_EACH, 'S2-1.4.0'])
def test_the_features_of_a_release(name: str, float64: None) -> None:
    with np.load(FOLDER / f'{name}.npz') as truth:
        images, features = truth['images'], truth['features']
    if GOLDEN[name][1] == 'DeepViT':
        assert features.shape == (len(images), 8)
    fields = fields_of(name, head=False) | {'param_dtype': 'float64'}
    with pytest.warns(convert.ConversionWarning, match=r'Left aside.*_head: (6|4|2) tensors'):
        model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields)
    assert relative_error(quickly(model.apply)(variables, images), features) <= FLOAT64_BOUND


def test_the_golden_releases_differ_where_they_should() -> None:
    """Two layouts with the same weights, the same images and another function: a golden file would show a mix-up."""
    logits = {name: golden(name)[1]['logits'] for name in CONVERTED}
    assert np.array_equal(logits['B-cos'], logits['S0-0.40.2'])
    assert np.array_equal(logits['V2-0.6.8'], logits['V3-0.9.3'])
    assert relative_error(logits['V7-1.16.0'], logits['V8-1.16.1']) <= FLOAT64_BOUND
    pairs = [('S0-0.35.0', 'S1-1.2.9'), ('S1-1.2.9', 'S3-1.4.1'), ('D0-0.40.2', 'D1-1.4.2')]
    vits = ['V0-0.2.7', 'V1-0.6.5', 'V2-0.6.8', 'V5-1.2.9', 'V6-1.15.7', 'V8-1.16.1']
    for one, other in [*pairs, *pairwise(vits)]:
        assert relative_error(logits[one], logits[other]) > 1e-2


def test_a_layout_of_an_older_function_computes_another(float64: None) -> None:
    """The failing twin: renaming S1's head norm to S3's, which loads cleanly, is seen."""
    tensors, truth = golden('S1-1.2.9')
    renamed = {
        name.replace('linear_head.0.', 'transformer.norm.').replace('linear_head.1.', 'linear_head.'): tensor
        for name, tensor in tensors.items()
    }
    model, variables = convert.from_torch(renamed, **fields_of('S3-1.4.1'), param_dtype='float64')
    assert relative_error(quickly(model.apply)(variables, truth['images']), truth['logits']) > 1e-3


@pytest.mark.parametrize(('name', 'scale_by_dim'), [('V1-0.6.5', True), ('V2-0.6.8', False)])
def test_a_release_tells_what_its_names_do_not(name: str, scale_by_dim: bool, float64: None) -> None:
    """V1 and V2 have the same names: the scale of the attention is assumed as today's, unless the release is given."""
    path, truth = FOLDER / f'{name}.pt', golden(name)[1]
    told = {field: value for field, value in fields_of(name).items() if field != 'scale_by_dim'}
    field = convert.inspect(path, **told).fields['scale_by_dim']
    assert (field.value, field.how) == (False, 'assumed')
    assert field.why.startswith('ViT of vit-pytorch 0.6.7 to 0.6.8 and ViT of vit-pytorch 0.3.0 to 0.6.6 wrote')
    with pytest.warns(convert.ConversionWarning, match='assumed, as in vit-pytorch: scale_by_dim=False'):
        assert convert.from_torch(path, **told)[0].scale_by_dim is False
    assert convert.inspect(path, **told).origin == f'{field.why.partition(" wrote")[0].replace(" and ", " or ")}'
    report = convert.verify(path, **told, count=1)
    assert 'computes what PyTorch does, if scale_by_dim=False: both sides' in report.verdict
    for release in (GOLDEN[name][0], {'V1': '0.3.0', 'V2': '0.6.7'}[layout_of(name)]):
        model, variables = convert.from_torch(path, **told, release=release, param_dtype='float64')
        assert model.scale_by_dim is scale_by_dim
        assert relative_error(quickly(model.apply)(variables, truth['images']), truth['logits']) <= FLOAT64_BOUND
    inspection = convert.inspect(path, **told, release=GOLDEN[name][0])
    assert inspection.layout.id == layout_of(name)
    assert inspection.fields['scale_by_dim'].how == 'inferred'


@pytest.mark.parametrize(
    ('release', 'words'),
    [
        ('1.2.9', r'No layout fits\. The nearest is (DeepViT of vit-pytorch 1\.0\.0|ViT of vit-pytorch 1\.0\.0)'),
        ('0.1.0', r'No model that vit-pytorch 0\.1\.0 wrote can be converted\. Those that can: ViT of'),
        ('new', r"release must be that of a vit-pytorch, such as '0\.6\.5', not 'new'"),
    ],
)
def test_a_release_that_did_not_write_this(release: str, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        convert.inspect(FOLDER / 'V1-0.6.5.pt', release=release)


def test_a_release_may_leave_out_zeros() -> None:
    """1.0 is 1.0.0: the first of S1's."""
    name = 'S1-1.2.4'
    assert convert.inspect(FOLDER / f'{name}.pt', **fields_of(name), release='1.0').layout.id == 'S1'


def test_a_class_token_before_1_4_goes_under_todays_names(float64: None) -> None:
    """Of the class token alone, the LayerNorm in the head computes what the final one does; of the mean it does not."""
    tensors, truth = golden('V5-1.2.9')
    model, variables = convert.from_torch(tensors, **fields_of('V5-1.2.9') | {'pool': 'cls', 'param_dtype': 'float64'})
    assert [layout.id for layout in architecture_of(model).layouts_of(model)] == ['V8', 'V5']
    written = convert.to_torch(model, variables)
    module = vit.ViT(**arguments('V5-1.2.9') | {'pool': 'cls'}).double().eval()
    module.load_state_dict({name: torch.tensor(array) for name, array in written.items()})
    logits = module(torch.tensor(truth['images'])).detach().numpy()
    assert relative_error(quickly(model.apply)(variables, truth['images']), logits) <= FLOAT64_BOUND
    assert relative_error(logits, truth['logits']) > 1e-3  # the mean's


def test_no_class_token_is_an_empty_one_in_pytorch() -> None:
    """Read as nothing, whether it is there or not, and written, so that today's vit-pytorch loads it strictly."""
    module = vit.ViT(**arguments('V8-1.16.1'))
    state_dict = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert state_dict['cls_token'].shape == (0, 8)
    without = {name: array for name, array in state_dict.items() if array.size}
    for source in (module, state_dict, without):
        told = {} if source is module else fields_of('V8-1.16.1')
        inspection = convert.inspect(source, **told)
        assert not inspection.unwrapped.left_aside
        assert (inspection.fields['class_token'].value, inspection.fields['pool'].value) == (False, 'mean')
        model, variables = convert.from_torch(source, **told)
        assert 'cls_token' not in variables['params']
        assert bits(convert.to_torch(model, variables)) == bits(state_dict)
        assert convert.to_torch(model, variables)['cls_token'].shape == (0, 8)
    assert convert.to_torch(model, variables, layout='V7')['cls_token'].shape == (1, 0, 8)
    with pytest.raises(ConversionError, match=r"pool='cls' contradicts the weights: it is 'mean'"):
        convert.inspect(state_dict, pool='cls')


@pytest.mark.parametrize('version', ['0.2.7', '0.6.5', '0.9.3', '1.2.9', '1.16.0', '1.16.1'])
def test_one_head_of_the_full_width_is_told_by_its_missing_projection(version: str) -> None:
    """Before 0.7.4 it had one all the same; both ways back are the same names."""
    (name,) = [name for name in GOLDEN if name.endswith(version) and name.startswith('V')]
    tensors, _ = golden(name)
    wide = {key: tensor for key, tensor in tensors.items() if '.to_out.' not in key}
    wide = {key: np.zeros((24, 8), 'float32') if 'to_qkv' in key else tensor for key, tensor in wide.items()}
    fields = {key: value for key, value in fields_of(name).items() if key != 'heads'}
    if version < '0.7':
        with pytest.raises(ConversionError, match=r'to_out\.0\.weight 8 x .*: missing'):
            convert.inspect(wide, **fields)
        return
    model, variables = convert.from_torch(wide, **fields)
    assert (model.heads, model.dim_head, model.project_out) == (1, 8, False)
    assert bits(convert.to_torch(model, variables, layout=layout_of(name))) == bits(wide)


def test_1_4_0_is_refused_with_the_reason() -> None:
    with pytest.raises(ConversionError, match=r'1\.4\.0, whose head is by mistake a LayerNorm.*linear_head\.weight'):
        convert.inspect(FOLDER / 'S2-1.4.0.pt')


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_to_torch_writes_the_newest_layout_or_the_one_asked_for(name: str) -> None:
    tensors, _ = golden(name)
    model, variables = convert.from_torch(FOLDER / f'{name}.pt', **fields_of(name))
    able = ABLE[layout_of(name)]
    newest = convert.to_torch(model, variables)
    assert convert.inspect(newest, **fields_of(name)).layout.id == able[0]
    for layout in (row.id for row in OF_VIT_PYTORCH):
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


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_without_the_head_the_way_back_is_bit_for_bit(name: str) -> None:
    tensors, _ = golden(name)
    body = {key: tensor for key, tensor in tensors.items() if not key.startswith(('linear_head.', 'mlp_head.'))}
    with pytest.raises(ConversionError, match=r'Only the head, (linear|mlp)_head, is missing: num_classes=0'):
        convert.from_torch(body, **fields_of(name))
    model, variables = convert.from_torch(body, **fields_of(name, head=False))
    assert model.num_classes == 0
    assert bits(convert.to_torch(model, variables, layout=layout_of(name))) == bits(body)


def test_an_unknown_layout_is_answered_with_those_there_are() -> None:
    model, variables = convert.from_torch(FOLDER / 'D2-1.4.3.pt', **fields_of('D2-1.4.3'))
    with pytest.raises(ConversionError, match=r"layout='D9'.*D2 \(DeepViT of vit-pytorch 1\.4\.3 and later\), D1"):
        convert.to_torch(model, variables, layout='D9')


@pytest.mark.parametrize('layout', [each for each in layouts_of_all() if not each.flax], ids=lambda layout: layout.id)
def test_renaming_goes_both_ways(layout: Layout) -> None:
    """Also in models of more than ten blocks, where a number has two digits."""
    theirs = leaves(layout, depth=12)
    assert {layout.to_today(name) for name in theirs} == {rule.name for rule, _ in theirs.values()}
    assert [layout.from_today(rule.name) for rule, _ in theirs.values()] == list(theirs)
    block = r'(?:(?<=\.layers\.|encoder_)|(?<=\bblocks\.))\d+'
    assert {re.sub(block, '#', name) for name in theirs} == template(layout).keys()


def test_each_number_of_a_name_may_have_its_place_in_the_other() -> None:
    theirs = Layout('', ViT, '', renames={'a.#.fns.#.fn.': 'b.#.fns_#.'})
    assert theirs.to_today('a.3.fns.12.fn.weight') == 'b.3.fns_12.weight'
    assert theirs.from_today('b.3.fns_12.weight') == 'a.3.fns.12.fn.weight'


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
    assert {layout_of(name) for name in CONVERTED} == {layout.id for layout in OF_VIT_PYTORCH}
    theirs = {model for model in MODELS.values() if not hasattr(model, 'ORIGIN')}
    assert {layout.model for layout in OF_VIT_PYTORCH} == theirs


@pytest.mark.parametrize('architecture', ARCHITECTURES, ids=lambda architecture: architecture.model.__name__)
def test_a_size_of_the_probe_tells_what_an_axis_holds(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two axes are alike; and another probe says the same of every parameter."""
    layout = architecture.layouts[0]
    quantities = architecture.quantities(layout.model(**architecture.probe, depth=1))
    assert len({axis.size(quantities) for axis in architecture.axes}) == len(architecture.axes)
    expected = leaves(layout, depth=2)
    other: Any = {'image_size': 33, 'patch_size': 3, 'channels': 5, 'dim': 28, 'mlp_dim': 37, 'num_classes': 41}
    other |= {'heads': 11, 'dim_head': 13}
    if not hasattr(layout.model, 'dim_head'):
        other = {**other, 'image_size': (80, 114), 'patch_size': (20, 38), 'dim': 88}
        other = {name: value for name, value in other.items() if name in architecture.probe} | {'rep_size': 50}
    other = {name: other[name] for name in architecture.probe}
    monkeypatch.setattr(type(architecture), 'probe', other)
    assert leaves(layout, depth=2) == expected


def test_a_model_of_somebody_else_goes_nowhere() -> None:
    class Own(SimpleViT):
        pass

    own = Own(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=8)
    for model in (own, nn.Dense(3)):
        with pytest.raises(ConversionError, match=rf'{type(model).__name__} is not a model of flax_vit'):
            convert.to_torch(model, {'params': {}})


@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_the_class_token_tells_how_todays_vit_pools(pool: str) -> None:
    module = vit.ViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=8, pool=pool)
    field = convert.inspect(module.state_dict(), heads=2).fields['pool']
    assert (field.value, field.how) == (pool, 'inferred')


@pytest.mark.parametrize('layout', layouts_of_all(), ids=lambda layout: layout.id)
def test_words_that_are_certain_are_in_each_layout(layout: Layout) -> None:
    for word in architecture_of(layout.model).certain:
        assert any(word in name for name in template(layout))


def test_layouts_that_cannot_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some hundredths of a second, for the model that its names are read off."""
    tried: list[set[str]] = []
    right = recognition.unwrap.candidates

    def candidates(leaves: Any, key: Any, layouts: tuple[Layout, ...], **options: Any) -> Any:
        tried.append({layout.id for layout in layouts})
        return right(leaves, key, layouts, **options)

    monkeypatch.setattr(recognition.unwrap, 'candidates', candidates)
    fields = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 1, 'heads': 2, 'mlp_dim': 20}
    state_dict = simple_vit.SimpleViT(**fields).state_dict()
    convert.inspect(state_dict)
    assert tried == [{'S3', 'S1', 'S0'}]
    del state_dict['to_patch_embedding.2.weight']
    with pytest.raises(ConversionError, match='The nearest is SimpleViT'):
        convert.inspect(state_dict)
    assert tried[1] == tried[0]
    assert tried[2] > {'S3', 'D2', 'V8', 'V0a'}
    convert.inspect(deepvit.DeepViT(**fields).state_dict())
    assert tried[-1] == {'S3', 'S1', 'S0', 'D2', 'V8', 'V7', 'V6'}  # without the blocks' names of before 1.4
    convert.inspect(convert.to_torch(*convert.from_torch(deepvit.DeepViT(**fields)), layout='D1'))
    assert tried[-1] > {'D2', 'D1', 'D0'}
