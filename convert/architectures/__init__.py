"""The architectures that are converted: one file each, beside `flax_vit/<model>.py`. Imports flax_vit alone.

A new one is a file here and its line in ARCHITECTURES.
"""

from functools import cache

from flax import linen as nn

from convert.architectures.architecture import Architecture, Layout
from convert.architectures.deep_vit import DeepViTArchitecture
from convert.architectures.official_deep_vit import OfficialDeepViTArchitecture
from convert.architectures.official_simple_vit import OfficialSimpleViTArchitecture
from convert.architectures.simple_vit import SimpleViTArchitecture
from convert.architectures.transformer import TransformerArchitecture
from convert.architectures.vit import ViTArchitecture
from convert.errors import ConversionError

ARCHITECTURES: list[Architecture] = [
    ViTArchitecture(),
    SimpleViTArchitecture(),
    DeepViTArchitecture(),
    OfficialSimpleViTArchitecture(),
    OfficialDeepViTArchitecture(),
]


def architecture_of(model: nn.Module | type[nn.Module]) -> Architecture:
    """The record of a model, or of its class. Raises ConversionError when it is none of them."""
    model_class = model if isinstance(model, type) else type(model)
    for architecture in (*ARCHITECTURES, *transformers()):
        if architecture.model is model_class:
            return architecture
    name = model_class.__name__
    raise ConversionError(f'{name} is not a model of flax_vit ({model_names()}): it has no PyTorch counterpart.')


def transformers() -> list[Architecture]:
    """The Transformers of the architectures, by themselves."""
    return [_transformer(whole) for whole in ARCHITECTURES if hasattr(whole.model, 'TRANSFORMER')]


_transformer = cache(TransformerArchitecture)


def layouts_of_all(part: str | None = None, release: str | None = None) -> tuple[Layout, ...]:
    """The layouts of all architectures, or of their Transformers where `part` is 'transformer'; those of a release.

    Raises ConversionError when no layout is known of that release.
    """
    architectures = ARCHITECTURES if part is None else transformers()
    known = [layout for architecture in architectures for layout in architecture.layouts]
    layouts = tuple(layout for layout in known if release is None or layout.wrote(release))
    if not layouts:
        those = ', '.join(map(str, known))
        raise ConversionError(f'No model that vit-pytorch {release} wrote can be converted. Those that can: {those}.')
    return layouts


def model_names() -> str:
    """'ViT, SimpleViT or DeepViT', and so on."""
    *others, last = (architecture.model.__name__ for architecture in ARCHITECTURES)
    return f'{", ".join(others)} or {last}'
