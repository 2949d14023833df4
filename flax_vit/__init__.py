"""vit-pytorch's DeepViT and SimpleViT as Flax modules."""

from flax_vit.deep_vit import DeepViT
from flax_vit.pretrained import from_pretrained, save_pretrained
from flax_vit.simple_vit import SimpleViT
from flax_vit.stacking import stack_layers, unstack_layers

__all__ = [
    'DeepViT',
    'SimpleViT',
    '__version__',
    'from_pretrained',
    'save_pretrained',
    'stack_layers',
    'unstack_layers',
]
__version__ = '0.1.0'
