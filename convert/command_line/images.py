"""Real images, for a comparison on what a model is meant to see."""

from pathlib import Path

import numpy as np
from flax import linen as nn

from convert.errors import ConversionError
from flax_vit.checks import pair

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def load_images(folder: Path, model: nn.Module, count: int) -> np.ndarray:
    """The first `count` images of a folder, by name, as `model` takes them: (count, height, width, channels), float32.

    They are resized, and scaled to -1 … 1: the comparison holds for any normalisation, so the training's is not needed.
    Raises ConversionError when there are none, when one is damaged, and when the model's channels are not an image's.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConversionError("Reading images needs Pillow: pip install 'flax-vit[images]'.") from error
    if not hasattr(model, 'channels'):
        raise ConversionError('A Transformer takes tokens, not images: leave out --images to compare on random tokens.')
    if model.channels not in MODES:
        raise ConversionError(f'Image files have 1, 3 or 4 channels; this model takes {model.channels}.')
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder of images.')
    height, width = pair(model.image_size)
    arrays = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with Image.open(path) as image:
                arrays.append(np.asarray(image.convert(MODES[model.channels]).resize((width, height)), np.float32))
        except UnidentifiedImageError:
            continue
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConversionError(f'{path} is damaged, or no image to be read: {error}.') from error
        if len(arrays) == count:
            break
    if not arrays:
        raise ConversionError(f'There is no image file in {folder} that Pillow can read.')
    return np.stack(arrays).reshape(-1, height, width, model.channels) / 127.5 - 1
