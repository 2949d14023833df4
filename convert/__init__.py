"""From vit-pytorch's checkpoints to Flax models, and back."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from convert.conversion import Inspection, from_torch, inspect, to_torch
    from convert.errors import ConversionError, ConversionWarning
    from convert.proof.parity import Report, verify
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            'ConversionError': 'convert.errors',
            'ConversionWarning': 'convert.errors',
            'Inspection': 'convert.conversion',
            'Report': 'convert.proof.parity',
            'from_torch': 'convert.conversion',
            'inspect': 'convert.conversion',
            'to_torch': 'convert.conversion',
            'verify': 'convert.proof.parity',
        },
    )

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
