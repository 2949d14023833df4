"""From vit-pytorch's checkpoints to Flax models, and back."""

from convert.conversion import Inspection, from_torch, inspect, to_torch
from convert.errors import ConversionError, ConversionWarning
from convert.verify import Report, verify

__all__ = [
    'ConversionError',
    'ConversionWarning',
    'Inspection',
    'Report',
    'from_torch',
    'inspect',
    'to_torch',
    'verify',
]
