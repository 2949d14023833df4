"""The fields of models: which make sense, which say how and not what is computed, and their errors."""

import dataclasses
from numbers import Integral, Real
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

# The fields that say how a model is computed and called, not what it computes.
COMPUTATION = frozenset({'dtype', 'precision', 'attention', 'query_chunk_size', 'remat', 'scan_layers', 'image_format'})
# Those that matter in training alone.
TRAINING = frozenset({'dropout', 'emb_dropout', 'attention_dropout', 'drop_path'})
IMAGE_FORMATS = {'channels_last': 'b (h p1) (w p2) c', 'channels_first': 'b c (h p1) (w p2)'}
# Of whole numbers, also of each of two.
SMALLEST = {'num_classes': 0} | dict.fromkeys(
    ('image_size', 'patch_size', 'dim', 'depth', 'heads', 'mlp_dim', 'channels', 'dim_head', 'query_chunk_size'), 1
)
FLOATS = ('float64', 'float32', 'float16', 'bfloat16')  # what weights and computations may be in


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number for both."""
    return value if isinstance(value, tuple) else (value, value)


def floating_dtype(what: str, dtype: Any) -> np.dtype[Any]:
    """The dtype of a name, a type or a dtype. ValueError unless it is one of `FLOATS`; `what` begins the message."""
    try:
        name = jnp.dtype(dtype).name if dtype is not None else 'None'  # which numpy would take for float64
    except (TypeError, ValueError):
        name = repr(dtype)
    if name not in FLOATS:
        raise ValueError(f'{what} must be {", ".join(FLOATS[:-1])} or {FLOATS[-1]}, not {name}.')
    return jnp.dtype(name)


def check_fields(model: Any, **smallest: int) -> None:
    """ValueError unless the fields of a model or a Transformer make sense; `smallest`: where `SMALLEST` is not so."""

    def check(right: bool, name: str, words: str) -> None:
        if not right:
            raise ValueError(f'{type(model).__name__}: {name} must be {words}, not {getattr(model, name)!r}.')

    types = {field.name: field.type for field in dataclasses.fields(model)}
    for name, least in (SMALLEST | smallest).items():
        value: Any = getattr(model, name, None)
        if name not in types or (value is None and types[name] == int | None):
            continue
        takes_two = tuple[int, int] in get_args(types[name])
        numbers = value if takes_two and isinstance(value, tuple) and len(value) == 2 else (value,)
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= least for n in numbers)
        check(whole, name, f'a whole number from {least} up')
    for name in types:
        value = getattr(model, name)
        if types[name] in (bool, bool | None):
            check(isinstance(value, bool), name, 'True or False')
        if name in TRAINING:
            check(isinstance(value, Real) and 0 <= float(value) <= 1, name, 'a rate from 0 to 1')
    if 'pool' in types:
        check(model.pool in ('cls', 'mean'), 'pool', "'cls' (class token) or 'mean' (of tokens)")
    if 'attention' in types:
        check(model.attention in ('plain', 'fused'), 'attention', "'plain' or 'fused'")
    if 'image_format' in types:
        words = f'{" or ".join(map(repr, IMAGE_FORMATS))}, or None for what fits'
        check(model.image_format in (None, *IMAGE_FORMATS), 'image_format', words)
        sides, patch = pair(model.image_size), pair(model.patch_size)
        if sides[0] % patch[0] or sides[1] % patch[1]:
            raise ValueError(
                f'{type(model).__name__}: the sides of image_size {sides} must be multiples of those of patch_size '
                f'{patch}.'
            )
    precision = model.precision
    one_for_each = precision if isinstance(precision, tuple) and len(precision) == 2 else (precision,)
    algorithm = isinstance(precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset) or (
        isinstance(precision, str) and precision in jax.lax.DotAlgorithmPreset.__members__
    )
    if not (precision is None or algorithm or all(map(_is_precision, one_for_each))):
        raise ValueError(
            f"{type(model).__name__}: precision={precision!r} is not valid: use 'default', 'high', 'highest' or "
            'another jax.lax.Precision, a pair of them, or a jax.lax.DotAlgorithmPreset.'
        )


def _is_precision(value: Any) -> bool:
    """Whether it is one of JAX's, or its name."""
    try:
        jax.lax.Precision(value)
    except ValueError:
        return False
    return isinstance(value, str | jax.lax.Precision)  # it takes numbers, too, which jax.numpy does not
