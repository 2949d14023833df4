"""Images as a model's authors gave them to it. Imports Pillow when it is asked for."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from flax_vit.folders.config import origin, read_config
from flax_vit.folders.hub import local_folder

KEYS = ('resize', 'crop', 'interpolation', 'mean', 'std')
FILTERS = {'bicubic': 'BICUBIC', 'bilinear': 'BILINEAR', 'area': 'BOX'}  # in Pillow's words


def preprocess(
    images: Sequence[Any], source: str | os.PathLike[str] | Mapping[str, Any]
) -> Float32[np.ndarray, 'batch height width channels']:
    """Pictures as the published accuracy of a model was measured on: resized, cropped, normalised.

    Each picture's shorter side becomes `resize` pixels, the `crop` x `crop` pixels in its middle are taken, and their
    values v in 0 … 1 become (v - mean) / std. docs/pretrained.md says where each model's figures are from.

    Args:
        images: Pictures of Pillow, or arrays of bytes (height, width, 3).
        source: The folder of a converted model, here or on the hub, whose `config.json` tells; or what it tells:
            {'resize': 256, 'crop': 224, 'interpolation': 'bicubic', 'mean': [...], 'std': [...]}.

    Returns:
        What the model takes, float32 (batch, crop, crop, 3).

    Raises:
        ValueError: When the folder says nothing of it, as vit-pytorch's own checkpoints don't; without pictures, and
            without Pillow.
        FileNotFoundError: When there is no such folder, here or on the hub.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("Preparing pictures needs Pillow: pip install 'flax-vit[images]'.") from error
    told = source if isinstance(source, Mapping) else kept_in(source)
    if set(told) != set(KEYS) or told['interpolation'] not in FILTERS or told['crop'] > told['resize']:
        raise ValueError(
            f'Give {", ".join(KEYS)}: crop at most resize, interpolation one of {", ".join(FILTERS)}; not {dict(told)}.'
        )
    if not len(images):
        raise ValueError('Give pictures, at least one.')
    arrays = []
    for image in images:
        picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert('RGB')
        width, height = (told['resize'] * side // min(picture.size) for side in picture.size)
        picture = picture.resize((width, height), getattr(Image.Resampling, FILTERS[told['interpolation']]))
        left, top = (round((side - told['crop']) / 2) for side in (width, height))
        picture = picture.crop((left, top, left + told['crop'], top + told['crop']))
        arrays.append(np.asarray(picture, np.float32) / 255)
    mean, std = (np.asarray(told[name], np.float32) for name in ('mean', 'std'))
    return (np.stack(arrays) - mean) / std


def kept_in(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a folder's `config.json` tells of it. ValueError when it does not."""
    facts, _ = origin(read_config(local_folder(folder)))
    if 'preprocessing' not in facts:
        raise ValueError(
            f'{folder} does not say how its training prepared pictures: do it as it did, or give the figures, '
            f'{{{", ".join(f"{key!r}: …" for key in KEYS)}}}.'
        )
    return facts['preprocessing']
