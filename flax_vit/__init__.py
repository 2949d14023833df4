"""vit-pytorch's DeepViT and SimpleViT as Flax modules."""

from flax_vit.deep_vit import DeepViT
from flax_vit.features import Features, features
from flax_vit.hub import push_to_hub
from flax_vit.pretrained import PretrainedWarning, from_pretrained, save_pretrained
from flax_vit.sharding import shardings
from flax_vit.simple_vit import SimpleViT
from flax_vit.stacking import stack_layers, unstack_layers

__all__ = [
    'DeepViT',
    'Features',
    'PretrainedWarning',
    'SimpleViT',
    '__version__',
    'features',
    'from_pretrained',
    'push_to_hub',
    'save_pretrained',
    'shardings',
    'stack_layers',
    'unstack_layers',
]
__version__ = '0.1.0'
