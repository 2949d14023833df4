"""vit-pytorch's DeepViT and SimpleViT as Flax modules."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from flax_vit.deep_vit import DeepViT
    from flax_vit.folders.hub import push_to_hub
    from flax_vit.folders.pretrained import PretrainedWarning, from_pretrained
    from flax_vit.folders.saving import save_pretrained
    from flax_vit.looking import Features, features
    from flax_vit.nnx_bridge import from_nnx, to_nnx
    from flax_vit.serving import export_serving
    from flax_vit.sharding import shardings
    from flax_vit.simple_vit import SimpleViT
    from flax_vit.stacking import stack_layers, unstack_layers
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            'DeepViT': 'deep_vit',
            'Features': 'looking',
            'PretrainedWarning': 'folders.pretrained',
            'SimpleViT': 'simple_vit',
            'export_serving': 'serving',
            'features': 'looking',
            'from_nnx': 'nnx_bridge',
            'from_pretrained': 'folders.pretrained',
            'push_to_hub': 'folders.hub',
            'save_pretrained': 'folders.saving',
            'shardings': 'sharding',
            'stack_layers': 'stacking',
            'to_nnx': 'nnx_bridge',
            'unstack_layers': 'stacking',
        },
    )

__all__ = [
    'DeepViT',
    'Features',
    'PretrainedWarning',
    'SimpleViT',
    '__version__',
    'export_serving',
    'features',
    'from_nnx',
    'from_pretrained',
    'push_to_hub',
    'save_pretrained',
    'shardings',
    'stack_layers',
    'to_nnx',
    'unstack_layers',
]
__version__ = '0.1.0'
