"""vit-pytorch's ViT, SimpleViT and DeepViT, and their papers' own models, as Flax modules."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from convert import ConversionError, ConversionWarning, from_torch, inspect, to_torch, verify
    from flax_vit.architectures import named
    from flax_vit.deep_vit import DeepViT
    from flax_vit.folders.hub import push_to_hub
    from flax_vit.folders.pretrained import PretrainedWarning, from_pretrained
    from flax_vit.folders.saving import save_pretrained
    from flax_vit.looking import Features, features
    from flax_vit.nnx_bridge import from_nnx, to_nnx
    from flax_vit.official_deep_vit import OfficialDeepViT
    from flax_vit.official_simple_vit import OfficialSimpleViT
    from flax_vit.preprocessing import preprocess
    from flax_vit.serving import export_serving
    from flax_vit.sharding import shardings
    from flax_vit.simple_vit import SimpleViT
    from flax_vit.stacking import stack_layers, unstack_layers
    from flax_vit.vit import ViT
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            'ConversionError': 'convert.errors',
            'ConversionWarning': 'convert.errors',
            'DeepViT': 'flax_vit.deep_vit',
            'OfficialDeepViT': 'flax_vit.official_deep_vit',
            'OfficialSimpleViT': 'flax_vit.official_simple_vit',
            'Features': 'flax_vit.looking',
            'PretrainedWarning': 'flax_vit.folders.pretrained',
            'SimpleViT': 'flax_vit.simple_vit',
            'ViT': 'flax_vit.vit',
            'export_serving': 'flax_vit.serving',
            'features': 'flax_vit.looking',
            'from_nnx': 'flax_vit.nnx_bridge',
            'from_pretrained': 'flax_vit.folders.pretrained',
            'from_torch': 'convert.conversion',
            'inspect': 'convert.conversion',
            'named': 'flax_vit.architectures',
            'preprocess': 'flax_vit.preprocessing',
            'push_to_hub': 'flax_vit.folders.hub',
            'save_pretrained': 'flax_vit.folders.saving',
            'shardings': 'flax_vit.sharding',
            'stack_layers': 'flax_vit.stacking',
            'to_nnx': 'flax_vit.nnx_bridge',
            'to_torch': 'convert.conversion',
            'unstack_layers': 'flax_vit.stacking',
            'verify': 'convert.proof.parity',
        },
    )

__all__ = [
    'ConversionError',
    'ConversionWarning',
    'DeepViT',
    'Features',
    'OfficialDeepViT',
    'OfficialSimpleViT',
    'PretrainedWarning',
    'SimpleViT',
    'ViT',
    '__version__',
    'export_serving',
    'features',
    'from_nnx',
    'from_pretrained',
    'from_torch',
    'inspect',
    'named',
    'preprocess',
    'push_to_hub',
    'save_pretrained',
    'shardings',
    'stack_layers',
    'to_nnx',
    'to_torch',
    'unstack_layers',
    'verify',
]
__version__ = '0.2.0.dev0'
