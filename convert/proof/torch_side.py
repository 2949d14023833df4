"""PyTorch's side of the comparison: vit-pytorch's own module. Torch is imported when it is asked for."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from convert.conversion import Inspection
from convert.errors import ConversionError
from flax_vit import DeepViT
from flax_vit.layers import COMPUTATION


class TorchSide:
    """The module of an inspected source in any dtype.

    `tensors` are its parameters by today's names. Images are (batch, height, width, channels), and are rounded to the
    dtype that is computed in; what comes back is float64.
    """

    def __init__(self, inspection: Inspection, tensors: Mapping[str, np.ndarray]) -> None:
        self.inspection, self.tensors = inspection, tensors
        self.module = cache(lambda dtype: torch_module(inspection, tensors, dtype))

    def outputs(self, dtype: str, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs of the named parts, '' being the whole."""
        module, outputs = self.module(dtype), {}
        import torch

        def keep(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                outputs[name] = output.double().clone().numpy()  # a clone: what follows may work in place

            return hook

        hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        with torch.no_grad():
            module(_to_torch(images, dtype))
        for hook in hooks:
            hook.remove()
        return outputs

    def gradients(self, dtype: str, images: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The gradients of the sum of weights x logits with respect to every parameter, by name."""
        module = self.module(dtype)
        import torch

        logits = module(_to_torch(images, dtype))
        loss = (logits * torch.from_numpy(weights).to(logits.dtype)).sum()
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        return {name: gradient.double().numpy() for name, gradient in zip(names, gradients, strict=True)}


def torch_module(inspection: Inspection, tensors: Mapping[str, np.ndarray], dtype: str) -> Any:
    """The vit-pytorch module with these tensors, in `dtype` ('float32', 'bfloat16', …), evaluating.

    For an older layout, today's parts are put together as that release had them. A SimpleViT gets the port's position
    table (the tables are compared apart), because PyTorch's depends on the processor in the last bits. PyTorch's random
    numbers are left as they were.
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
    with torch.random.fork_rng(devices=[]):
        module = (deepvit.DeepViT if deep else simple_vit.SimpleViT)(
            **arguments | {'num_classes': model.num_classes or 1}
        )
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

    module = module.double().eval()  # every dtype of weights fits in, so what is rounded is rounded once
    module.load_state_dict({name: torch.from_numpy(np.array(tensor, np.float64)) for name, tensor in tensors.items()})
    return module.to(getattr(torch, dtype))


def _to_torch(images: np.ndarray, dtype: str) -> Any:
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).to(getattr(torch, dtype))


def table_difference(model: Any) -> tuple[float, float]:
    """The largest difference between the port's sincos table and PyTorch's on this machine, and what it may be.

    Both take the same float32 steps. PyTorch's power may be one unit in the last place (2⁻²³) off, its product half
    a unit more; an angle, at most the position, carries both into the sine, which adds a unit of its own.
    """
    from vit_pytorch.simple_vit import posemb_sincos_2d

    height, width = model.grid
    theirs = posemb_sincos_2d(height, width, model.dim).numpy()
    return float(np.abs(theirs - model.pos_embedding()).max()), (2 * max(height, width) + 1) * 2.0**-23
