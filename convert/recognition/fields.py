"""What the model's fields are: given by the caller, inferred from the weights, or assumed as vit-pytorch's defaults."""

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

import numpy as np
from flax import linen as nn

from convert.architectures import architecture_of
from convert.architectures.architecture import Field
from convert.errors import ConversionError
from convert.recognition.layouts import Fit
from flax_vit.architectures import defaults_of


def resolve(fit: Fit, given: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> dict[str, Field]:
    """Every field of the model that `fit` describes; what nothing tells is 'unknown', with the argument that tells it.

    `given` is what the caller says, `known` what the source says beside its weights.

    Raises ConversionError when a given field is none of the model's, or contradicts the weights.
    """
    model, defaults = fit.layout.model, defaults_of(fit.layout.model)
    architecture = architecture_of(model)
    given = _checked(model, given)
    open_fields = {
        name
        for layout in fit.alike
        for name in layout.fields
        if name not in fit.told and len({other.fields.get(name, defaults[name]) for other in fit.alike}) > 1
    }
    by_names = {**fit.told, **fit.layout.fields}
    told: list[tuple[str, Mapping[str, Any]]] = [  # where two tell the same field, the later
        ('the layout of names', {name: value for name, value in by_names.items() if name not in open_fields}),
        ('the module', known or {}),
        ('the number of blocks', {'depth': fit.depth}),
        ('their shapes', {name: size for name, size in fit.sizes.items() if name in defaults}),
    ]
    inferred = {name: Field(value, 'inferred', why) for why, values in told for name, value in values.items()}
    for name in sorted(given.keys() & inferred.keys()):
        if given[name] != inferred[name].value:
            advice = ''
            if name == 'num_classes':
                advice = (
                    ' For another head, convert the model as it is, save it, and read it again: '
                    f'flax_vit.from_pretrained(folder, num_classes={given[name]!r}).'
                )
            raise ConversionError(
                f'{name}={given[name]!r} contradicts the weights: it is {inferred[name].value!r} by '
                f'{inferred[name].why}.{advice}'
            )
    fields = inferred | {name: Field(value, 'given') for name, value in given.items()}
    fields = architecture.told_by_sizes(fields, fit.sizes, defaults)
    for name, default in defaults.items():
        if name in open_fields:
            eras = ' and '.join(str(layout) for layout in fit.alike)
            why = f'{eras} wrote the same names: give release=, that of the training, or {name}='
            fields.setdefault(name, Field(default, 'assumed', why))
        elif name in architecture.assumed:
            fields.setdefault(name, Field(default, 'assumed', f"{fit.layout.source}'s default"))
        elif name == 'param_dtype':  # unless all tensors have the same
            fields.setdefault(name, Field(np.dtype(default), 'inferred', "the models' default: the tensors differ"))
        else:
            fields.setdefault(name, Field(default, 'inferred', 'the layout of names'))
    return {name: fields[name] for name in defaults}


def _checked(model: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller says, as plain values. ConversionError for what is no field of the model, or no size."""
    names = list(defaults_of(model))
    strangers = sorted(given.keys() - names)
    if strangers:
        raise ConversionError(f'{model.__name__} has no {", ".join(strangers)}; its fields are {", ".join(names)}.')
    values = {name: _plain(value) for name, value in given.items()}
    pairs = {field.name for field in dataclasses.fields(model) if tuple[int, int] in get_args(field.type)}
    for name in _SIZES & values.keys():
        two = isinstance(values[name], tuple) and len(values[name]) == 2 and name in pairs
        numbers = values[name] if two else (values[name],)
        if not all(type(number) is int and number > 0 for number in numbers):
            or_two = ', or two' if name in pairs else ''
            raise ConversionError(f'{name} must be a whole number from 1 up{or_two}, not {values[name]!r}.')
    return values


_SIZES = {'image_size', 'patch_size', 'channels', 'dim', 'depth', 'heads', 'dim_head', 'mlp_dim'}


def _plain(value: Any) -> Any:
    """A field's value with whole numbers as Python's, and one where two are the same."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, list | tuple):
        numbers = tuple(map(_plain, value))
        return numbers[0] if len(numbers) == 2 and numbers[0] == numbers[1] else numbers
    return value
