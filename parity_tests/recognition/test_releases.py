"""vit-pytorch's releases, fetched from the package index: their own source is the reference.

`pytest -m releases` runs these. The edges of every layout's range are here, the releases where a source file changed
within one, and the newest. Where the index is out of reach they are skipped.
"""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convert
from convert import ConversionError
from parity_tests.golden.make import FIELDS_OF, architecture, arguments_of, download, random_images, reference
from parity_tests.support.reference import FLOAT64_BOUND, perturbed, quickly, relative_error

pytestmark = pytest.mark.releases

SIMPLE: dict[str, list[str | None]] = {
    'S0': ['0.35.0', '0.35.3', '0.40.2'],
    'S1': ['1.0.0', '1.2.4', '1.2.5', '1.2.9'],
    'S3': ['1.4.1', '1.18.0', '1.21.0', None],
}
# Others' files of a SimpleViT.
FILES: dict[str, tuple[str, list[str | None]]] = {
    'S3R': ('simple_vit_with_register_tokens', ['1.5.0', '1.6.0', None]),
    'S3Q': ('simple_vit_with_qk_norm', ['1.4.2', '1.5.0', None]),
}
DEEP: dict[str, list[str | None]] = {
    'D0': ['0.9.0', '0.29.1', '0.30.0', '0.40.2'],
    'D1': ['1.0.0', '1.4.2'],
    'D2': ['1.4.3', None],
}
# The edges of each layout's range, with the mean and, where it is another function, with the class token.
VITS: dict[str, list[str | None]] = {
    'V0a': ['0.2.0'],
    'V0b': ['0.2.1'],
    'V0': ['0.2.2', '0.2.7'],
    'V1': ['0.3.0', '0.4.0', '0.6.6'],
    'V2': ['0.6.7', '0.6.8'],
    'V3': ['0.7.4', '0.9.3'],
    'V4': ['0.10.1', '0.17.3', '0.40.2'],
    'V5': ['1.0.0', '1.2.9'],
    'V6': ['1.4.0', '1.15.7', '1.16.0'],
    'V7': ['1.16.0'],
    'V8': ['1.16.1', '1.19.4', None],
}
RELEASES = [
    *(
        (model, layout, version, None)
        for model, layouts in [('SimpleViT', SIMPLE), ('DeepViT', DEEP)]
        for layout, versions in layouts.items()
        for version in versions
    ),
    *(('SimpleViT', layout, version, file) for layout, (file, versions) in FILES.items() for version in versions),
]


@pytest.fixture(scope='session')
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a version (None: the newest) to its wheel, each fetched once."""
    folder = tmp_path_factory.mktemp('wheels')
    fetched: dict[str | None, Path] = {}
    failed: list[str] = []  # once is enough: pip takes its time before it gives up

    def wheel(version: str | None) -> Path:
        if version not in fetched and not failed:
            try:
                fetched[version] = download(folder / str(version), version)
            except subprocess.SubprocessError as error:
                said = getattr(error, 'stderr', None) or error
                failed.append(f'vit-pytorch {version or "(the newest)"} could not be fetched: {said}')
        if failed:
            pytest.skip(failed[0])
        return fetched[version]

    return wheel


@pytest.mark.parametrize(('model', 'layout', 'version', 'file'), RELEASES)
def test_a_release(model: str, layout: str, version: str | None, file: str | None, wheels: Any, float64: None) -> None:
    """Its state dict and its live module convert to what it computes, and its names come back with every bit."""
    module = perturbed(architecture(wheels(version), model, file)(**FIELDS_OF[model])).double()
    images = random_images(FIELDS_OF[model])
    state_dict = module.state_dict()
    fields = {**FIELDS_OF[model], **({'num_classes': FIELDS_OF[model]['dim']} if layout == 'S3Q' else {})}
    inspection = convert.inspect(state_dict, **fields)
    assert inspection.layout.id == layout
    port, variables = convert.from_torch(state_dict, **fields)
    written = convert.to_torch(port, variables, layout=layout)
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in state_dict.items()
    }
    truth = reference(module, images)['logits']
    assert relative_error(quickly(port.apply)(variables, images), truth) <= FLOAT64_BOUND
    told = {} if hasattr(module, 'pos_embedding') else {'image_size': FIELDS_OF[model]['image_size']}
    assert convert.inspect(module, **told).model == port


@pytest.mark.parametrize(('wanted', 'version'), [('D1', '1.0.0'), ('D1', '1.4.2'), ('D2', None)])
def test_a_release_loads_what_is_written_for_it(wanted: str, version: str | None, wheels: Any, float64: None) -> None:
    """DeepViT's function has names of two eras: each release takes its own, strictly, and computes the same."""
    newest = perturbed(architecture(wheels(None), 'DeepViT')(**FIELDS_OF['DeepViT'])).double()
    written = convert.to_torch(*convert.from_torch(newest), layout=wanted)
    other = architecture(wheels(version), 'DeepViT')(**FIELDS_OF['DeepViT']).double().eval()
    other.load_state_dict({name: torch.tensor(array) for name, array in written.items()})
    images = random_images(FIELDS_OF['DeepViT'])
    assert np.array_equal(reference(other, images)['logits'], reference(newest, images)['logits'])


@pytest.mark.parametrize(
    ('layout', 'version', 'others'),
    [
        (layout, version, {'pool': pool, **wide})
        for layout, versions in VITS.items()
        for version in versions
        for pool, wide in [('mean', {}), ('cls', {'heads': 1, 'dim_head': 8, 'image_size': 12})]
        if (layout, version, pool) not in {('V6', '1.16.0', 'mean'), ('V7', '1.16.0', 'cls')}
    ],
)
def test_a_release_of_vit(layout: str, version: str | None, others: dict[str, Any], wheels: Any, float64: None) -> None:
    """Its state dict converts to what it computes, also of a smaller image, and comes back with every bit."""
    arguments = arguments_of('ViT', version, **others)
    if arguments['heads'] == 2 and others.get('heads'):  # before dim_head
        arguments['heads'] = 1
    module = perturbed(architecture(wheels(version), 'ViT')(**arguments)).double()
    state_dict = module.state_dict()
    told = {name: arguments[name] for name in ('image_size', 'channels', 'heads')}
    told |= {
        name: arguments.get(name, usual) for name, usual in [('dropout', 0.0), ('emb_dropout', 0.0), ('pool', 'cls')]
    }
    if version:
        told['release'] = version
    assert convert.inspect(state_dict, **told).layout.id == layout
    port, variables = convert.from_torch(state_dict, **told)
    written = convert.to_torch(port, variables, layout=layout)
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in state_dict.items()
    }
    images = random_images(arguments)
    small = [images] if layout in ('V0a', 'V0b', 'V0', 'V7') else [images, images[:, :, :4, :-2]]
    for each in small:  # the earliest releases, and by mistake 1.16.0, take no smaller ones
        assert relative_error(quickly(port.apply)(variables, each), reference(module, each)['logits']) <= FLOAT64_BOUND
    newest = convert.to_torch(port, variables)
    if convert.inspect(newest, **{k: v for k, v in told.items() if k != 'release'}).layout.id == 'V8':
        today = architecture(wheels(None), 'ViT')(**arguments_of('ViT', None, **others)).double().eval()
        today.load_state_dict({name: torch.tensor(array) for name, array in newest.items()})
        assert np.array_equal(reference(today, images)['logits'], reference(module, images)['logits'])


def test_1_4_0_is_refused(wheels: Any) -> None:
    module = architecture(wheels('1.4.0'), 'SimpleViT')(**FIELDS_OF['SimpleViT'])
    for source in (module, module.state_dict()):
        with pytest.raises(ConversionError, match=r'1\.4\.0, whose head is by mistake a LayerNorm'):
            convert.inspect(source, **FIELDS_OF['SimpleViT'] if source is not module else {})


@pytest.mark.parametrize(('version', 'layout'), [('0.40.2', 'S0'), ('1.2.9', 'S1'), ('1.4.0', 'S3'), (None, 'S3')])
def test_patch_dropout_is_simple_vit_at_rest(version: str | None, layout: str, wheels: Any, float64: None) -> None:
    fields = FIELDS_OF['SimpleViT']
    module = perturbed(architecture(wheels(version), 'SimpleViT', 'simple_vit_with_patch_dropout')(**fields)).double()
    assert convert.inspect(module.state_dict(), **fields).layout.id == layout
    port, variables = convert.from_torch(module, image_size=fields['image_size'])
    images = random_images(fields)
    assert relative_error(quickly(port.apply)(variables, images), reference(module, images)['logits']) <= FLOAT64_BOUND
