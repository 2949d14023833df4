"""vit-pytorch's ViT, SimpleViT and DeepViT, and their papers' own models, as Flax modules."""

from typing import TYPE_CHECKING

from flax_vit.lazy import lazily

if TYPE_CHECKING:
    from convert import (
        ConversionError as ConversionError,
        ConversionWarning as ConversionWarning,
        from_torch as from_torch,
        inspect as inspect,
        to_torch as to_torch,
        verify as verify,
    )
    from flax_vit.architectures import named as named
    from flax_vit.deep_vit import DeepViT as DeepViT
    from flax_vit.folders.hub import push_to_hub as push_to_hub
    from flax_vit.folders.pretrained import PretrainedWarning as PretrainedWarning, from_pretrained as from_pretrained
    from flax_vit.folders.saving import save_pretrained as save_pretrained
    from flax_vit.looking import Features as Features, features as features
    from flax_vit.nnx_bridge import from_nnx as from_nnx, to_nnx as to_nnx
    from flax_vit.official_deep_vit import OfficialDeepViT as OfficialDeepViT
    from flax_vit.official_simple_vit import OfficialSimpleViT as OfficialSimpleViT
    from flax_vit.preprocessing import preprocess as preprocess
    from flax_vit.serving import export_serving as export_serving
    from flax_vit.sharding import shardings as shardings
    from flax_vit.simple_vit import SimpleViT as SimpleViT
    from flax_vit.stacking import stack_layers as stack_layers, unstack_layers as unstack_layers
    from flax_vit.vit import ViT as ViT
else:
    __getattr__, __dir__, __all__ = lazily(
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
__version__ = '0.2.0.dev0'
