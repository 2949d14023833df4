"""The architectures that are converted: one file each, beside `flax_vit/<model>.py`. Imports flax_vit alone.

A new one is a file here and its line in ARCHITECTURES.
"""

from flax import linen as nn

from convert.architectures.architecture import Architecture, Layout
from convert.architectures.deep_vit import DeepViTArchitecture
from convert.architectures.simple_vit import SimpleViTArchitecture
from convert.architectures.vit import ViTArchitecture
from convert.errors import ConversionError

ARCHITECTURES: list[Architecture] = [ViTArchitecture(), SimpleViTArchitecture(), DeepViTArchitecture()]


def architecture_of(model: nn.Module | type[nn.Module]) -> Architecture:
    """The record of a model, or of its class. Raises ConversionError when it is none of them."""
    model_class = model if isinstance(model, type) else type(model)
    for architecture in ARCHITECTURES:
        if architecture.model is model_class:
            return architecture
    name = model_class.__name__
    raise ConversionError(f'A {name} is no {model_names()} of flax_vit: there is no PyTorch model of it.')


def all_layouts() -> list[Layout]:
    """Those of all architectures."""
    return [layout for architecture in ARCHITECTURES for layout in architecture.layouts]


def model_names() -> str:
    """'ViT, SimpleViT or DeepViT'."""
    *others, last = (architecture.model.__name__ for architecture in ARCHITECTURES)
    return f'{", ".join(others)} or {last}'
