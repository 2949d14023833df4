"""PyTorch's side of the comparison: vit-pytorch's own module. Torch is imported when it is asked for."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.conversion import Inspection
from convert.errors import ConversionError
from flax_vit.checks import COMPUTATION


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

    For an older layout, today's parts are put together as that release had them. PyTorch's random numbers are left as
    they were.
    Raises ConversionError when torch or vit-pytorch is not installed.
    """
    try:
        import torch
        import vit_pytorch  # noqa: F401
    except ImportError as error:
        raise ConversionError(
            f"Comparing with PyTorch needs torch and vit-pytorch ({error}): pip install 'flax-vit[torch]'."
        ) from error

    architecture = architecture_of(inspection.model)
    flax_only = COMPUTATION | {'param_dtype'} | architecture.release_fields
    arguments = {name: field.value for name, field in inspection.fields.items() if name not in flax_only}
    with torch.random.fork_rng(devices=[]):
        module = architecture.torch_module(inspection.model, arguments)
    module = module.double().eval()  # every dtype of weights fits in, so what is rounded is rounded once
    module.load_state_dict({name: torch.from_numpy(np.array(tensor, np.float64)) for name, tensor in tensors.items()})
    return module.to(getattr(torch, dtype))


def _to_torch(images: np.ndarray, dtype: str) -> Any:
    import torch

    tensor = torch.from_numpy(images).to(getattr(torch, dtype))
    return tensor.permute(0, 3, 1, 2) if images.ndim == 4 else tensor  # tokens
