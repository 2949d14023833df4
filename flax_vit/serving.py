"""A model as one file, program and weights: to be run where there is JAX and neither flax nor flax_vit."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, export
from jaxtyping import Float

from flax_vit.architectures import is_ours
from flax_vit.checks import pair
from flax_vit.folders.whole_files import appearing_whole
from flax_vit.parameters import check_variables

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
PROGRAM = 'program'  # the name of the program's bytes in the file, beside the weights


def export_serving(
    target: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `jax.export`'s program for inference, and the weights that it is called with, to one .npz.

    The program takes weights (arrays by name) and float32 images (batch, height, width, channels) for any batch, or
    (batch, channels, height, width) if the model's image_format is 'channels_first'. The
    weights keep their bits; numpy has no bfloat16, so that these are in the file as uint16, to be viewed as what
    `program.in_avals` says. The file appears whole or not at all.

    Args:
        target: The file.
        model: One of the models.
        variables: Its variables, {'params': ...}.
        platforms: On which of these the program is to run.
        image_size: Pixels, or (height, width), where it is not the model's: a DeepViT takes smaller ones, too.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: When the target is there and may not be replaced.
        FileNotFoundError: When its folder is not there.
        ValueError: For a target that is a folder, variables of another model, weights or a computation in float64,
            platforms that JAX does not know, an image size that the model doesn't take, and when flatbuffers, which
            jax.export writes with, is missing.
    """
    target = Path(target)
    if target.is_dir():
        raise ValueError(f'{target} is a folder; give the name of a file, such as {target / "model.npz"}.')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists; give another name, or overwrite=True (--overwrite).')
    strangers = [platform for platform in platforms if platform not in PLATFORMS]
    if strangers or not platforms:
        raise ValueError(f'platforms must be some of {", ".join(PLATFORMS)}, not {", ".join(strangers) or "none"}.')
    check_variables(model, variables)
    if not is_ours(model):
        raise ValueError('A Transformer alone takes no images: export the model that you build with it.')
    weights = {'/'.join(path): np.asarray(array) for path, array in flatten_dict(variables).items()}
    wide = [name for name, array in weights.items() if array.dtype == np.float64]
    if wide:
        raise ValueError(
            f'{len(wide)} weights ({wide[0]}, …) are float64, which JAX computes only in its 64-bit mode; cast them: '
            "flax_vit.from_pretrained(folder, param_dtype='float32') (--param-dtype float32)."
        )

    if model.dtype == np.float64:
        raise ValueError(
            'The model computes in float64, which JAX has only in its 64-bit mode: '
            "flax_vit.from_pretrained(folder, dtype='float32') (--dtype float32)."
        )

    def logits(weights: Mapping[str, Array], images: Float[Array, 'batch ...']) -> Float[Array, 'batch outputs']:
        result: Any = model.clone(image_format=model.image_format or 'channels_last').apply(
            unflatten_dict({tuple(name.split('/')): array for name, array in weights.items()}), images
        )
        return result

    with jax.enable_x64(False):
        (batch,) = export.symbolic_shape('batch')
        sides = pair(model.image_size if image_size is None else image_size)
        shape = (
            (batch, model.channels, *sides)
            if model.image_format == 'channels_first'
            else (batch, *sides, model.channels)
        )
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
        traced = export.export(jax.jit(logits), platforms=platforms)(shapes, jax.ShapeDtypeStruct(shape, np.float32))
    try:
        program = np.frombuffer(traced.serialize(), np.uint8)
    except ImportError as error:
        raise ValueError("The program is written with flatbuffers: pip install 'flax-vit[serving]'.") from error
    arrays: dict[str, Any] = {PROGRAM: program}
    for name, array in weights.items():
        arrays[name] = array.view(np.uint16) if array.dtype.name == 'bfloat16' else array
    with appearing_whole(target) as partial, partial.open('wb') as file:
        np.savez(file, **arrays)
