"""vit-pytorch's DeepViT and SimpleViT as Flax modules."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from flax_vit.deep_vit import DeepViT
    from flax_vit.nnx_bridge import from_nnx, to_nnx
    from flax_vit.pretrained import from_pretrained, save_pretrained
    from flax_vit.serving import export_serving
    from flax_vit.simple_vit import SimpleViT
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            'DeepViT': 'deep_vit',
            'SimpleViT': 'simple_vit',
            'export_serving': 'serving',
            'from_nnx': 'nnx_bridge',
            'from_pretrained': 'pretrained',
            'save_pretrained': 'pretrained',
            'to_nnx': 'nnx_bridge',
        },
    )

__all__ = [
    'DeepViT',
    'SimpleViT',
    '__version__',
    'export_serving',
    'from_nnx',
    'from_pretrained',
    'save_pretrained',
    'to_nnx',
]
__version__ = '0.1.0'
