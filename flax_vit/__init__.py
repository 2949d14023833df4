"""vit-pytorch's DeepViT and SimpleViT as Flax modules."""

from flax_vit.deep_vit import DeepViT
from flax_vit.pretrained import from_pretrained, save_pretrained
from flax_vit.simple_vit import SimpleViT

__all__ = ['DeepViT', 'SimpleViT', '__version__', 'from_pretrained', 'save_pretrained']
__version__ = '0.1.0'
