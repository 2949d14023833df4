"""The sizes that papers and benchmarks speak of, by name."""

from difflib import get_close_matches
from typing import Any

from flax_vit.architectures import MODELS

# Of Touvron et al. 2021 (arXiv:2012.12877), table 1, and of Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; the
# heads have 64 numbers each, vit-pytorch's default. 'readme' is the example of vit-pytorch's README.
SIZES: dict[str, dict[str, int]] = {
    'ti': {'dim': 192, 'depth': 12, 'heads': 3, 'mlp_dim': 768},
    's': {'dim': 384, 'depth': 12, 'heads': 6, 'mlp_dim': 1536},
    'b': {'dim': 768, 'depth': 12, 'heads': 12, 'mlp_dim': 3072},
    'l': {'dim': 1024, 'depth': 24, 'heads': 16, 'mlp_dim': 4096},
}
README = {'image_size': 256, 'patch_size': 32, 'dim': 1024, 'depth': 6, 'heads': 16, 'mlp_dim': 2048}
FIELDS: dict[str, dict[str, int]] = {'readme': README} | {
    f'{size}{patch_size}': {'image_size': 224, 'patch_size': patch_size, **fields}
    for size, fields in SIZES.items()
    for patch_size in (16, 32)
}


def names() -> list[str]:
    """Those that `named` takes: 'deep_vit_readme', 'deep_vit_ti16', …"""
    return [f'{_snake(model)}_{size}' for model in MODELS.values() for size in FIELDS]


def named(name: str, **fields: Any) -> Any:
    """A model of a size that has a name, for 224 x 224 images and 1,000 classes; there are no trained weights here.

    Args:
        name: The model and the size: 'simple_vit_s16' is SimpleViT S with patches of 16 x 16 pixels. Sizes are Ti, S, B
            and L with patches of 16 or 32, and 'readme', vit-pytorch's example.
        **fields: Fields of the model, instead of or beside those of the size.

    Returns:
        The linen module.

    Raises:
        ValueError: For another name, and when the fields make no model.
    """
    for model in MODELS.values():
        size = name.removeprefix(f'{_snake(model)}_')
        if size != name and size in FIELDS:
            return model(**{'num_classes': 1000, **FIELDS[size], **fields})
    near = get_close_matches(name, names(), 1)
    hint = f'do you mean {near[0]}?' if near else f'the names are {", ".join(names())}.'
    raise ValueError(f'{name!r} is no size that has a name; {hint}')


def _snake(model: type[Any]) -> str:
    """The name of the model's file: simple_vit."""
    return model.__module__.rpartition('.')[2]
