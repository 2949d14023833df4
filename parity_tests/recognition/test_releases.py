"""vit-pytorch's releases, fetched from the package index: their own source is the reference.

`pytest -m releases` runs these. The edges of every layout's range are here, the releases where a source file changed
within one, and the newest. Where the index is out of reach they are skipped.
"""

import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from convert import ConversionError
from parity_tests.golden.make import FIELDS_OF, architecture, download, random_images, reference
from parity_tests.support.reference import FLOAT64_BOUND, perturbed, relative_error

pytestmark = pytest.mark.releases

SIMPLE: dict[str, list[str | None]] = {
    'S0': ['0.35.0', '0.35.3', '0.40.2'],
    'S1': ['1.0.0', '1.2.4', '1.2.5', '1.2.9'],
    'S3': ['1.4.1', '1.18.0', '1.21.0', None],
}
DEEP: dict[str, list[str | None]] = {
    'D0': ['0.9.0', '0.29.1', '0.30.0', '0.40.2'],
    'D1': ['1.0.0', '1.4.2'],
    'D2': ['1.4.3', None],
}
RELEASES = [
    (model, layout, version)
    for model, layouts in [('SimpleViT', SIMPLE), ('DeepViT', DEEP)]
    for layout, versions in layouts.items()
    for version in versions
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


@pytest.mark.parametrize(('model', 'layout', 'version'), RELEASES)
def test_a_release(model: str, layout: str, version: str | None, wheels: Any, float64: None) -> None:
    """Its state dict and its live module convert to what it computes, and its names come back with every bit."""
    module = perturbed(architecture(wheels(version), model)(**FIELDS_OF[model])).double()
    images = random_images(FIELDS_OF[model])
    state_dict = module.state_dict()
    inspection = convert.inspect(state_dict, **FIELDS_OF[model])
    assert inspection.layout.id == layout
    port, variables = convert.from_torch(state_dict, **FIELDS_OF[model])
    written = convert.to_torch(port, variables, layout=layout)
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in state_dict.items()
    }
    truth = reference(module, images)['logits']
    assert relative_error(jax.jit(port.apply)(variables, images), truth) <= FLOAT64_BOUND
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
    assert relative_error(jax.jit(port.apply)(variables, images), reference(module, images)['logits']) <= FLOAT64_BOUND
