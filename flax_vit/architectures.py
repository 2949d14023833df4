"""The list of models, by name. What is particular to one, its class says: HEAD, POSITIONS, MAPS, SAME_WEIGHTS.

Where it names its TRANSFORMER, that can be converted, saved and read alone.
"""

from dataclasses import fields
from typing import Any

from flax import linen as nn

from flax_vit.deep_vit import DeepViT
from flax_vit.simple_vit import SimpleViT
from flax_vit.vit import ViT

MODELS: dict[str, type[Any]] = {model.__name__: model for model in (DeepViT, SimpleViT, ViT)}


def field_names(model_class: type[nn.Module]) -> list[str]:
    """The names of a model's own arguments."""
    return [field.name for field in fields(model_class) if field.name not in {'parent', 'name'}]


def classes() -> dict[str, type[Any]]:
    """What a folder may hold, by the name it has there: the models, and their Transformers alone."""
    whole = MODELS.items()
    return MODELS | {f'{name}.transformer': model.TRANSFORMER for name, model in whole if hasattr(model, 'TRANSFORMER')}


def is_ours(model: object) -> bool:
    """Whether it is one of the models themselves, and no subclass."""
    return type(model) in MODELS.values()
