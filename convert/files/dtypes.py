"""The numbers that arrays may be of, by PyTorch's and by numpy's names."""

from typing import Any

import ml_dtypes
import numpy as np

_NUMPY = 'float64 float32 float16 complex64 complex128 bool uint8 uint16 uint32 uint64 int8 int16 int32 int64'
_BEYOND_NUMPY = 'bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu'
DTYPES: dict[str, np.dtype[Any]] = {f'torch.{name}': np.dtype(name) for name in _NUMPY.split()}
DTYPES |= {f'torch.{name}': np.dtype(getattr(ml_dtypes, name)) for name in _BEYOND_NUMPY.split()}

# As numpy writes them into files, without the order of their bytes: 'f4', and 'ml_dtypes.bfloat16'.
KINDS = {np.dtype(name).str[1:]: np.dtype(name) for name in _NUMPY.split()}
KINDS |= {f'ml_dtypes.{name}': DTYPES[f'torch.{name}'] for name in _BEYOND_NUMPY.split()}
KINDS |= {'V2': DTYPES['torch.bfloat16']}  # of 2 bytes that numpy has no name for


def native(array: np.ndarray) -> np.ndarray:
    """The array with this machine's order of bytes: itself, or a copy."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder('='))
