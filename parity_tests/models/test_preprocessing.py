"""Pictures are prepared as the published accuracies were measured, and the folder of a converted model says how."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert import from_torch, inspect
from convert.architectures import architecture_of
from convert.conversion import provenance
from flax_vit import OfficialDeepViT, SimpleViT, named, preprocess, save_pretrained
from parity_tests.recognition.test_official import of_big_vision

HALF: Any = {'mean': [0.5] * 3, 'std': [0.5] * 3}


def test_pictures_are_resized_cropped_and_normalised() -> None:
    """By the shorter side, the middle, the values of bytes from -1 to 1."""
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    told = {'resize': 50, 'crop': 40, 'interpolation': 'area', **HALF}
    small, oblong = preprocess([columns, Image.fromarray(columns.transpose(1, 0, 2).copy())], told)
    assert small.dtype == np.float32
    assert small.shape == (40, 40, 3)
    # halved; of 100 columns, those from 30 to 69, each the mean of two
    expected = (np.arange(30, 70) * 2 + 0.5) / 255 * 2 - 1
    np.testing.assert_allclose(small[0, :, 0], expected, rtol=0, atol=0.51 / 127.5)
    np.testing.assert_array_equal(oblong, small.transpose(1, 0, 2))
    grey = preprocess([Image.new('L', (60, 45), 255)], told)
    np.testing.assert_allclose(grey, 1)


def test_as_torchvision_does() -> None:
    """Resize of the shorter side, CenterCrop, Normalize, with Pillow."""
    from torchvision import transforms

    told = {'resize': 37, 'crop': 30, 'interpolation': 'bicubic', 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.4]}
    theirs = transforms.Compose([
        transforms.Resize(37, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(30),
        transforms.ToTensor(), transforms.Normalize(told['mean'], told['std']),
    ])  # fmt: skip
    for size in ((61, 90), (90, 61), (53, 53), (31, 200)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        expected = theirs(picture).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(preprocess([picture], told)[0], expected, rtol=0, atol=1e-6)


def test_a_folder_says_how(tmp_path: Path) -> None:
    found = inspect(of_big_vision(), image_size=224)
    save_pretrained(tmp_path / 'a', *from_torch(of_big_vision()), source=provenance(found))
    assert preprocess([Image.new('RGB', (300, 400))], tmp_path / 'a').shape == (1, 224, 224, 3)
    save_pretrained(tmp_path / 'b', *from_torch(of_big_vision()), source='somewhere')
    with pytest.raises(ValueError, match='does not say how its training prepared pictures'):
        preprocess([], tmp_path / 'b')
    with pytest.raises(ValueError, match='at least one'):
        preprocess([], tmp_path / 'a')
    with pytest.raises(ValueError, match='interpolation one of bicubic, bilinear, area'):
        preprocess([], {'resize': 3, 'crop': 3, 'interpolation': 'best', **HALF})
    with pytest.raises(ValueError, match='crop at most resize'):
        preprocess([], {'resize': 3, 'crop': 4, 'interpolation': 'area', **HALF})


def test_what_is_known_of_the_published_models() -> None:
    def told(model: Any, number: int = 0) -> dict[str, Any] | None:
        architecture = architecture_of(model)
        return architecture.preprocessing(architecture.layouts[number], model)

    usual = {'crop': 224, 'interpolation': 'bicubic', **HALF}
    assert told(named('deepvit_S')) == {'resize': 248, **usual}
    assert told(named('deepvit_L_384')) == {'resize': 384, **usual, 'crop': 384}
    assert told(OfficialDeepViT(image_size=32, patch_size=4, num_classes=2, dim=4, depth=1, heads=1, mlp_dim=1)) is None
    assert told(named('official_simple_vit_s16')) == {'resize': 256, **usual, 'interpolation': 'area'}
    size: Any = {'image_size': 224, 'patch_size': 16, 'num_classes': 2, 'dim': 8, 'depth': 1, 'heads': 1, 'mlp_dim': 1}
    of_b_cos = told(SimpleViT(**size), -1)
    assert of_b_cos is not None
    assert (of_b_cos['resize'], of_b_cos['mean']) == (256, [0.485, 0.456, 0.406])
    assert told(SimpleViT(**size)) is None
