"""The main job on weights that ship with the project: vit-pytorch's models, trained on handwritten digits."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.command_line.console import out, working
from convert.command_line.display import show_inspection, show_report
from convert.conversion import inspect, place, provenance
from convert.errors import ConversionError
from convert.proof.parity import verify
from flax_vit import from_pretrained, save_pretrained

# What the weights cannot tell, of the models that examples/digits/train.py trains.
FIELDS: dict[str, dict[str, Any]] = {
    'vit': {'image_size': 8, 'patch_size': 4, 'channels': 1, 'heads': 2, 'dropout': 0.1, 'emb_dropout': 0.1},
    'simple_vit': {'image_size': 8, 'patch_size': 4, 'channels': 1, 'heads': 3},
    'deep_vit': {'image_size': 8, 'patch_size': 4, 'channels': 1, 'pool': 'cls', 'dropout': 0.1, 'emb_dropout': 0.1},
}


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels to train on, images and labels held out, of scikit-learn's handwritten digits.

    Every fifth digit is held out. Images are (batch, 8, 8, 1), float32, from -1 (paper) to 1 (ink); labels 0 to 9.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConversionError("The digits come with scikit-learn: pip install 'flax-vit[demo]'.") from error
    data = load_digits()
    images = (data.images[..., None] / 8 - 1).astype(np.float32)
    held_out = np.arange(len(images)) % 5 == 0
    return images[~held_out], data.target[~held_out], images[held_out], data.target[held_out]


def checkpoint_path(name: str) -> Path:
    """The shipped checkpoint: in the installed package, or in a checkout."""
    installed = Path(__file__).parents[1] / 'digits' / f'{name}.pt'
    return installed if installed.exists() else Path(__file__).parents[2] / 'examples' / 'digits' / f'{name}.pt'


def demo() -> bool:
    """Convert, verify and compare the models; whether all is right."""
    with working('Reading the digits'):
        _, _, images, labels = digits()
    right = True
    for name, fields in FIELDS.items():
        source = checkpoint_path(name)
        out.rule(f'{name}: {source.name}, as a PyTorch trainer saved it')
        with working(f'Converting {source.name}'), tempfile.TemporaryDirectory() as folder:
            inspection = inspect(source, **fields)
            save_pretrained(folder, inspection.model, place(inspection), source=provenance(inspection))
            model, variables = from_pretrained(folder)
        with working('Running PyTorch and Flax, in float64 and float32'):
            report = verify(source, converted=(model, variables), images=images, **fields)
            logits = jax.jit(model.apply)(variables, jnp.asarray(images))
        accuracy = np.mean(logits.argmax(axis=-1) == labels)
        show_inspection(inspection)
        out.print()
        show_report(report)
        out.print(f'right in Flax: {accuracy:.2%} of {len(images)} held-out digits\n')
        right = right and report.right and report.agreement == 1
    out.rule('Next, on your own checkpoint')
    out.print('flax-vit inspect CHECKPOINT       what is it, and what is missing?')
    out.print('flax-vit convert CHECKPOINT OUT   to a folder for flax_vit.from_pretrained(OUT)')
    out.print('flax-vit verify CHECKPOINT OUT    the proof, on your weights')
    return right
