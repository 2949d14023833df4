"""The PyTorch module to compare with, built from vit-pytorch itself. Torch is imported when it is asked for."""

from typing import Any

import numpy as np

from convert.conversion import Inspection
from convert.errors import ConversionError
from flax_vit import DeepViT
from flax_vit.layers import COMPUTATION


def torch_module(inspection: Inspection, dtype: str) -> Any:
    """The vit-pytorch module with the source's own tensors, in `dtype` ('float32', 'bfloat16', …), evaluating.

    For an older layout, today's parts are put together as that release had them. A SimpleViT gets the port's position
    table (the tables are compared apart), because PyTorch's depends on the processor in the last bits.
    Raises ConversionError when torch or vit-pytorch is not installed.
    """
    try:
        import torch
        from torch import nn
        from vit_pytorch import deepvit, simple_vit
    except ImportError as error:
        raise ConversionError(
            f"Comparing with PyTorch needs torch and vit-pytorch ({error}): pip install 'flax-vit[torch]'."
        ) from error

    model = inspection.model
    flax_only = COMPUTATION | {'param_dtype', 'patch_norm', 'norm_after_mean'}
    arguments = {name: field.value for name, field in inspection.fields.items() if name not in flax_only}
    deep = isinstance(model, DeepViT)
    module = (deepvit.DeepViT if deep else simple_vit.SimpleViT)(**arguments | {'num_classes': model.num_classes or 1})
    if not model.patch_norm:
        cut, _, linear, _ = module.to_patch_embedding
        module.to_patch_embedding = nn.Sequential(cut, linear)
    if not deep:
        module.pos_embedding = torch.from_numpy(model.pos_embedding())
        if model.norm_after_mean:
            module.linear_head = nn.Sequential(module.transformer.norm, module.linear_head)
            module.transformer.norm = nn.Identity()
    if not model.num_classes:
        setattr(module, 'mlp_head' if deep else 'linear_head', nn.Identity())

    today = {inspection.layout.to_today(name): tensor for name, tensor in inspection.tensors.items()}
    module = module.double().eval()  # every dtype of weights fits in, so what is rounded is rounded once
    module.load_state_dict({name: torch.from_numpy(np.array(tensor, np.float64)) for name, tensor in today.items()})
    return module.to(getattr(torch, dtype))


def torch_outputs(module: Any, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """The outputs, as float64, of the named parts of `module` ('' is the whole).

    `images`: (batch, height, width, channels); they are rounded to the module's dtype.
    """
    import torch

    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = output.double().clone().numpy()  # a clone: what follows may work in place

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        module(_to_torch(module, images))
    for hook in hooks:
        hook.remove()
    return outputs


def torch_gradients(module: Any, images: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients, as float64, of the sum of weights x logits with respect to every parameter, by name."""
    import torch

    logits = module(_to_torch(module, images))
    (logits * torch.from_numpy(weights).to(logits.dtype)).sum().backward()
    return {name: parameter.grad.double().numpy() for name, parameter in module.named_parameters()}


def _to_torch(module: Any, images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).to(next(module.parameters()).dtype)


def table_difference(model: Any) -> tuple[float, float]:
    """The largest difference between the port's sincos table and PyTorch's on this machine, and what it may be.

    Both take the same float32 steps. PyTorch's power may be one unit in the last place (2⁻²³) off, its product half
    a unit more; an angle, at most the position, carries both into the sine, which adds a unit of its own.
    """
    from vit_pytorch.simple_vit import posemb_sincos_2d

    height, width = model.grid
    theirs = posemb_sincos_2d(height, width, model.dim).numpy()
    return float(np.abs(theirs - model.pos_embedding()).max()), (2 * max(height, width) + 1) * 2.0**-23
