"""A live torch module: is it one of those we port, and what does it tell beyond its weights? Torch is not imported."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import ConversionError
from flax_vit.simple_vit import posemb_sincos_2d

PORTED = {
    'vit_pytorch.simple_vit.SimpleViT',
    'vit_pytorch.simple_vit_with_patch_dropout.SimpleViT',
    'vit_pytorch.simple_flash_attn_vit.SimpleViT',
    'vit_pytorch.deepvit.DeepViT',
}

# Modules that compute what the one inside them computes, and where it is.
WRAPPERS = {
    'torch.nn.parallel.data_parallel.DataParallel': 'module',
    'torch.nn.parallel.distributed.DistributedDataParallel': 'module',
    'torch.optim.swa_utils.AveragedModel': 'module',
    'torch._dynamo.eval_frame.OptimizedModule': '_orig_mod',
}

# What the ported modules are built of, with the settings that the port mirrors.
PARTS: Mapping[str, Mapping[str, Any]] = {
    'torch.nn.modules.activation.GELU': {'approximate': 'none'},
    'torch.nn.modules.activation.Softmax': {'dim': -1},
    'torch.nn.modules.container.ModuleList': {},
    'torch.nn.modules.container.Sequential': {},
    'torch.nn.modules.dropout.Dropout': {},
    'torch.nn.modules.linear.Identity': {},
    'torch.nn.modules.linear.Linear': {},
    'torch.nn.modules.normalization.LayerNorm': {'eps': 1e-5},
    'einops.layers.torch.Rearrange': {},
}


def is_module(source: object) -> bool:
    """Whether `source` is a torch.nn.Module, or looks like one."""
    return hasattr(source, 'state_dict') and hasattr(source, 'named_modules')


def unwrapped(module: Any) -> Any:
    """The ported module inside torch's wrappers. Raises ConversionError when it, or a part of it, is another class."""
    while class_name(module) in WRAPPERS:
        module = getattr(module, WRAPPERS[class_name(module)])
    if class_name(module) not in PORTED:
        raise ConversionError(
            f'This module is a {class_name(module)}, which is none of {", ".join(sorted(PORTED))}. '
            'If it computes what one of those does, pass its state_dict().'
        )
    own = type(module).__module__
    for name, part in module.named_modules():
        part_class = class_name(part)
        if part_class.startswith(f'{own}.'):
            continue
        if part_class not in PARTS:
            raise ConversionError(
                f'{name} is a {part_class}, which {class_name(module)} does not have: another function.'
            )
        for setting, value in PARTS[part_class].items():
            if getattr(part, setting) != value:
                raise ConversionError(
                    f'{name} has {setting}={getattr(part, setting)!r}, not {value!r}: another function.'
                )
    return module


def known_fields(module: Any) -> dict[str, Any]:
    """Fields of the Flax model that the module itself tells, where the weights can't."""
    parts = [part for _, part in module.named_modules()]
    rearrange, *_ = [part for part in parts if class_name(part) == 'einops.layers.torch.Rearrange']
    attention, *_ = [part for part in parts if type(part).__name__ == 'Attention']
    patch_size = rearrange.axes_lengths['p1'], rearrange.axes_lengths['p2']
    fields = {'heads': attention.heads, 'patch_size': patch_size[0] if patch_size[0] == patch_size[1] else patch_size}
    head = getattr(module, 'mlp_head', None) or module.linear_head
    if class_name(head) == 'torch.nn.modules.linear.Identity':
        fields['num_classes'] = 0
    if type(module).__name__ == 'DeepViT':
        return fields | {'pool': module.pool, 'dropout': attention.to_out[1].p, 'emb_dropout': module.dropout.p}
    if hasattr(module, 'pos_embedding'):  # since vit-pytorch 1.4.0
        grid = sincos_grid(module.pos_embedding.detach().cpu().numpy())
        image_size = grid[0] * patch_size[0], grid[1] * patch_size[1]
        fields['image_size'] = image_size[0] if image_size[0] == image_size[1] else image_size
    return fields


def sincos_grid(table: np.ndarray) -> tuple[int, int]:
    """The height and width in patches of the grid whose sincos table (height x width, dim) this is."""
    tokens, dim = table.shape
    for height in range(1, tokens + 1):
        width = tokens // height
        if height * width == tokens and np.abs(posemb_sincos_2d(height, width, dim) - table).max() < 1e-3:
            return height, width
    raise ConversionError('pos_embedding is not the sincos table of SimpleViT: another function.')


def class_name(value: object) -> str:
    """The full name of the class, as imported."""
    return f'{type(value).__module__}.{type(value).__qualname__}'
