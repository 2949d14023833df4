"""From vit-pytorch's checkpoints to Flax models, and back."""

from convert.conversion import Inspection, from_torch, inspect, to_torch
from convert.errors import ConversionError, ConversionWarning

__all__ = ['ConversionError', 'ConversionWarning', 'Inspection', 'from_torch', 'inspect', 'to_torch']
