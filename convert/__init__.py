"""From vit-pytorch's checkpoints to Flax models, and back."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from convert.conversion import (
        Inspection as Inspection,
        from_torch as from_torch,
        inspect as inspect,
        to_torch as to_torch,
    )
    from convert.errors import ConversionError as ConversionError, ConversionWarning as ConversionWarning
    from convert.proof.parity import Report as Report, verify as verify
else:
    __getattr__, __dir__, __all__ = lazily(
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
