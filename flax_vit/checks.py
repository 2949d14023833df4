"""The fields of models: which make sense, which say how and not what is computed, and their errors."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# The fields that say how a model is computed and called, not what it computes.
COMPUTATION = frozenset({'dtype', 'precision', 'query_chunk_size', 'remat', 'scan_layers', 'image_format'})
# Those that matter in training alone.
TRAINING = frozenset({'dropout', 'emb_dropout', 'attention_dropout', 'drop_path'})
IMAGE_FORMATS = {'channels_last': 'b (h p1) (w p2) c', 'channels_first': 'b c (h p1) (w p2)'}
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


def check_sizes(model: nn.Module, *, pairs: Sequence[str] = (), **smallest: int) -> None:
    """ValueError unless each named field is a whole number not below the smallest allowed; or two, if among `pairs`."""
    for name, least in smallest.items():
        value = getattr(model, name)
        numbers = value if name in pairs and isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= least for n in numbers):
            raise ValueError(f'{type(model).__name__}: {name} must be a whole number from {least} up, not {value!r}.')


def check_rates(model: nn.Module, *names: str) -> None:
    """ValueError unless each named field is a rate of dropout."""
    for name in names:
        rate = getattr(model, name)
        if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
            raise ValueError(f'{type(model).__name__}: {name} must be a rate from 0 to 1, not {rate!r}.')


def check_divisible(model: nn.Module, image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """ValueError unless whole patches fill the image."""
    if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
        raise ValueError(
            f'{type(model).__name__}: the sides of image_size {image_size} must be multiples of those of '
            f'patch_size {patch_size}.'
        )


def check_pool(model: Any) -> None:
    """ValueError unless `pool` is one that there is."""
    if model.pool not in ('cls', 'mean'):
        raise ValueError(
            f"{type(model).__name__}: pool must be 'cls' (class token) or 'mean' (of tokens), not {model.pool!r}."
        )


def check_options(model: Any) -> None:
    """ValueError unless the fields that say how a model is computed, not what, make sense."""
    if getattr(model, 'query_chunk_size', None) is not None:
        check_sizes(model, query_chunk_size=1)
    check_switches(model, *(name for name in ('remat', 'scan_layers') if hasattr(model, name)))
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


def check_image_format(model: Any) -> None:
    """ValueError unless the order of an image's axes is known, or left to what fits."""
    if model.image_format not in (None, *IMAGE_FORMATS):
        raise ValueError(
            f'{type(model).__name__}: image_format must be {" or ".join(map(repr, IMAGE_FORMATS))}, '
            f'or None for what fits, not {model.image_format!r}.'
        )


def check_switches(model: Any, *names: str) -> None:
    """ValueError unless each named field is True or False."""
    for name in names:
        if not isinstance(getattr(model, name), bool):
            raise ValueError(f'{type(model).__name__}: {name} must be True or False, not {getattr(model, name)!r}.')
