"""The list of models, by name. What is particular to one, its class says: HEAD, POSITIONS, MAPS, SAME_WEIGHTS.

Where it names its TRANSFORMER, that can be converted, saved and read alone.
"""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from flax import linen as nn

from flax_vit.deep_vit import DeepViT
from flax_vit.official_deep_vit import OfficialDeepViT
from flax_vit.official_simple_vit import OfficialSimpleViT
from flax_vit.simple_vit import SimpleViT
from flax_vit.sizes import FIELDS
from flax_vit.vit import ViT

MODELS: dict[str, type[Any]] = {
    model.__name__: model for model in (DeepViT, OfficialDeepViT, OfficialSimpleViT, SimpleViT, ViT)
}


def defaults_of(model_class: type[nn.Module]) -> dict[str, Any]:
    """A model's own arguments and their defaults, `dataclasses.MISSING` where there is none."""
    fields = dataclasses.fields(model_class)
    return {field.name: field.default for field in fields if field.name not in {'parent', 'name'}}


def classes() -> dict[str, type[Any]]:
    """What a folder may hold, by the name it has there: the models, and their Transformers alone."""
    whole = MODELS.items()
    return MODELS | {f'{name}.transformer': model.TRANSFORMER for name, model in whole if hasattr(model, 'TRANSFORMER')}


def name_of(model_class: type[Any]) -> str:
    """The name of one of `classes`."""
    return next(name for name, each in classes().items() if each is model_class)


def is_ours(model: object) -> bool:
    """Whether it is one of the models themselves, and no subclass."""
    return type(model) in MODELS.values()


def sizes_by_name() -> dict[str, tuple[type[Any], Mapping[str, Any]]]:
    """What `named` takes, 'simple_vit_s16' and so on, by the names of the models' files: the model and its fields."""
    return {
        name: (model, fields)
        for model in MODELS.values()
        for name, fields in getattr(model, 'VARIANTS', _usual_sizes(model)).items()
    }


def _usual_sizes(model: type[Any]) -> Mapping[str, Mapping[str, Any]]:
    return {f'{model.__module__.rpartition(".")[2]}_{size}': fields for size, fields in FIELDS.items()}


def named(name: str, **overrides: Any) -> Any:
    """A model of a size that has a name, with 1,000 classes. There are no trained weights of it here.

    Args:
        name: The model and the size: 'simple_vit_s16' is SimpleViT S with patches of 16 x 16 pixels. Sizes are Ti, S, B
            and L with patches of 16 or 32, for 224 x 224 images, and 'readme', vit-pytorch's example, for 256 x 256.
            Of the papers' own models: 'official_simple_vit_s16', and 'deepvit_S' and the others that its authors named.
        **overrides: Fields of the model, instead of or beside those of the size.

    Returns:
        The linen module.

    Raises:
        ValueError: For another name, and when the fields make no model.
    """
    sizes = sizes_by_name()
    if name not in sizes:
        near = get_close_matches(name, sizes, 1)
        hint = f'do you mean {near[0]}?' if near else f'the names are {", ".join(sizes)}.'
        raise ValueError(f'{name!r} is not the name of a size; {hint}')
    model, fields = sizes[name]
    return model(**{'num_classes': 1000, **fields, **overrides})
