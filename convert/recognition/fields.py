"""What the model's fields are: given by the caller, inferred from the weights, or assumed as vit-pytorch's defaults."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flax import linen as nn

from convert.errors import ConversionError
from convert.recognition.layouts import Fit


@dataclass(frozen=True)
class Field:
    """The value of a model's field and how it came about."""

    value: Any  # None when unknown
    how: Literal['given', 'inferred', 'assumed', 'unknown']
    why: str = ''  # empty where an unknown follows from another


def names(model: type[nn.Module]) -> list[str]:
    """The fields of `model` that a caller may set, in the order of its signature."""
    return list(_defaults(model))


def resolve(fit: Fit, given: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> dict[str, Field]:
    """Every field of the model that `fit` describes; what nothing tells is 'unknown', with the argument that tells it.

    `given` is what the caller says, `known` what the source says beside its weights.

    Raises ConversionError when a given field is none of the model's, or contradicts the weights.
    """
    model, defaults = fit.layout.model, _defaults(fit.layout.model)
    strangers = sorted(set(given) - set(defaults))
    if strangers:
        raise ConversionError(f'{model.__name__} has no {", ".join(strangers)}; its fields are {", ".join(defaults)}.')

    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for name in _SIZES & set(given):
        if not all(isinstance(number, int) and number > 0 for number in _pair(given[name])):
            raise ConversionError(f'{name} must be a whole number from 1 up, not {given[name]!r}.')
    inferred = {name: Field(value, 'inferred', 'the layout of names') for name, value in fit.layout.fields.items()}
    inferred |= {name: Field(value, 'inferred', 'the module') for name, value in (known or {}).items()}
    inferred['depth'] = Field(fit.depth, 'inferred', 'the number of blocks')
    for name in ('dim', 'mlp_dim', 'num_classes', 'heads'):
        if name in fit.sizes:
            inferred[name] = Field(fit.sizes[name], 'inferred', 'their shapes')
    fields = inferred | {name: Field(value, 'given') for name, value in given.items()}
    for name in sorted(set(given) & set(inferred)):
        if given[name] != inferred[name].value:
            value, why = inferred[name].value, inferred[name].why
            raise ConversionError(f'{name}={given[name]!r} contradicts the weights: it is {value!r} by {why}.')
    fields |= _heads(fields, fit.sizes['heads x dim_head'], defaults['dim_head'])
    fields |= _patches(fields, fit.sizes['channels x patch area'], defaults['channels'])
    fields |= _image(fields, fit.sizes.get('patches'))
    for name, default in defaults.items():
        if name in _NOT_IN_WEIGHTS:
            fields.setdefault(name, Field(default, 'assumed', "vit-pytorch's default"))
        elif name == 'param_dtype':  # unless all tensors have the same
            fields.setdefault(name, Field(np.dtype(default), 'inferred', "the models' default: the tensors differ"))
        else:
            fields.setdefault(name, Field(default, 'inferred', 'the layout of names'))
    return {name: fields[name] for name in defaults}


_SIZES = {'image_size', 'patch_size', 'channels', 'dim', 'depth', 'heads', 'dim_head', 'mlp_dim'}
_NOT_IN_WEIGHTS = {'pool', 'dropout', 'emb_dropout'}


def _defaults(model: type[nn.Module]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(model) if field.name not in {'parent', 'name'}}


def _heads(fields: Mapping[str, Field], inner_dim: int, default: int) -> dict[str, Field]:
    """Heads and dim_head, of which the weights hold the product."""
    heads, dim_head = fields.get('heads'), fields.get('dim_head')
    arithmetic = f'to_qkv holds 3 x {inner_dim}, that is 3 x heads x dim_head'
    if heads and dim_head:
        if heads.value * dim_head.value != inner_dim:
            raise ConversionError(f'heads={heads.value} x dim_head={dim_head.value} is not {inner_dim}: {arithmetic}.')
        return {}
    for known, name, other in ((heads, 'heads', 'dim_head'), (dim_head, 'dim_head', 'heads')):
        if known:
            if inner_dim % known.value:
                raise ConversionError(f'{name}={known.value} does not divide {inner_dim}: {arithmetic}.')
            return {other: Field(inner_dim // known.value, 'inferred', f'{inner_dim} / {name} {known.value}')}
    if inner_dim % default == 0:
        why = f"{arithmetic}; dim_head {default} is vit-pytorch's default"
        return {
            'dim_head': Field(default, 'assumed', why),
            'heads': Field(inner_dim // default, 'assumed', why),
        }
    choices = ', '.join(f'heads={n} if dim_head is {inner_dim // n}' for n in range(1, 33) if inner_dim % n == 0)
    why = f"{arithmetic}, and vit-pytorch's default dim_head {default} does not divide it: {choices}"
    return {'heads': Field(None, 'unknown', why), 'dim_head': Field(None, 'unknown')}


def _patches(fields: Mapping[str, Field], patch_dim: int, default: int) -> dict[str, Field]:
    """Channels and patch_size, of which the weights hold channels x patch height x patch width."""
    channels, patch_size = fields.get('channels'), fields.get('patch_size')
    arithmetic = f'a patch holds {patch_dim} values, that is channels x patch height x patch width'
    if patch_size:
        area = math.prod(_pair(patch_size.value))
        if patch_dim % area or (channels and channels.value * area != patch_dim):
            shown = f'patch_size={patch_size.value}' + (f' with channels={channels.value}' if channels else '')
            raise ConversionError(f'{shown} does not fit: {arithmetic}.')
        return {'channels': Field(patch_dim // area, 'inferred', f'{patch_dim} / {area}')} if not channels else {}
    if channels:
        if patch_dim % channels.value:
            raise ConversionError(f'channels={channels.value} does not divide {patch_dim}: {arithmetic}.')
        side = math.isqrt(patch_dim // channels.value)
        if side**2 * channels.value == patch_dim:
            return {'patch_size': Field(side, 'inferred', f'{patch_dim} = {channels.value} x {side}²')}
        return {'patch_size': Field(None, 'unknown', f'{arithmetic}; give patch_size=(height, width)')}
    side = math.isqrt(patch_dim // default)
    if default * side**2 == patch_dim:
        why = f"{arithmetic}; {default} channels are vit-pytorch's default"
        return {'channels': Field(default, 'assumed', why), 'patch_size': Field(side, 'assumed', why)}
    choices = ', '.join(
        f'channels={patch_dim // n**2} if patch_size is {n}'
        for n in range(1, math.isqrt(patch_dim) + 1)
        if patch_dim % n**2 == 0
    )
    why = f"{arithmetic}, and vit-pytorch's default of {default} channels does not fit a square: {choices}"
    return {'channels': Field(None, 'unknown', why), 'patch_size': Field(None, 'unknown')}


def _image(fields: Mapping[str, Field], patches: int | None) -> dict[str, Field]:
    """image_size: DeepViT's pos_embedding has a row for each patch of a square; SimpleViT's table is not saved."""
    image_size, patch_size = fields.get('image_size'), fields['patch_size']
    if patches is None:
        why = "the weights don't hold SimpleViT's image size: give image_size=224 (or a pair) as in training"
        return {} if image_size else {'image_size': Field(None, 'unknown', why)}
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ConversionError(f'pos_embedding has {patches} patches and a class token, but {patches} is not a square.')
    if patch_size.value is None:
        return {} if image_size else {'image_size': Field(None, 'unknown')}
    inferred = side * patch_size.value
    if image_size and image_size.value != inferred:
        raise ConversionError(
            f'image_size={image_size.value!r} contradicts the weights: pos_embedding has {side} x {side} patches '
            f'of {patch_size.value}, which is {inferred}.'
        )
    how: Any = 'assumed' if patch_size.how == 'assumed' else 'inferred'
    return {} if image_size else {'image_size': Field(inferred, how, f'{side} x {side} patches of {patch_size.value}')}


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)
