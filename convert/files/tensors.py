"""Torch's tensors to arrays, and those that hold no plain numbers by name, with what makes them plain."""

import re
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.files.dtypes import DTYPES

_KINDS = {
    'sparse': (
        'a sparse tensor. Make it dense, and convert\n'
        '    {name: tensor.to_dense() for name, tensor in state_dict.items()}'
    ),
    'quantised': (
        'a quantised tensor. Convert the weights of before the quantisation; what is left of them is\n'
        '    {name: tensor.dequantize() for name, tensor in state_dict.items()}'
    ),
    'meta': (
        'a tensor of the meta device, which has a shape and no numbers: load the weights into the model, for instance '
        'by load_state_dict(state_dict, assign=True), before its state dict is taken or saved.'
    ),
    'sharded': (
        'a part of a tensor that lies on several processes. In all of them, put it together and convert\n'
        '    {name: tensor.full_tensor() for name, tensor in state_dict.items()}\n'
        'or what torch.distributed.checkpoint.state_dict.get_model_state_dict gives with\n'
        '    options=StateDictOptions(full_state_dict=True, cpu_offload=True)'
    ),
}
# What stands in a file where such a tensor was -> its kind.
_STAND_INS = {
    r'torch\._utils\._rebuild_sparse_\w*tensor': 'sparse',
    r'torch\._utils\._rebuild_qtensor|torchao\..*': 'quantised',
    r'torch\._utils\._rebuild_meta_tensor_no_storage': 'meta',
    r'torch\.distributed\..*(DTensor|ShardedTensor)': 'sharded',
}


def words_for(stand_in: str) -> str | None:
    """What tensor stood where a file has a Foreign of this name, and what to do; None where it was none of these."""
    return next((_KINDS[kind] for name, kind in _STAND_INS.items() if re.fullmatch(name, stand_in)), None)


def array(tensor: Any) -> np.ndarray:
    """A torch tensor -> an array of the same dtype, shape and bits: a view where the tensor is on the CPU.

    bfloat16 and float8 get ml_dtypes' types. Raises: ConversionError for sparse, quantised and meta tensors, and those
    that are sharded over several processes.
    """
    if hasattr(tensor, 'full_tensor'):
        if tensor.device_mesh.size() > 1:  # to put it together would wait for all of them
            raise ConversionError(_KINDS['sharded'])
        tensor = tensor.full_tensor()
    is_of = {'sparse': str(tensor.layout) != 'torch.strided', 'quantised': tensor.is_quantized, 'meta': tensor.is_meta}
    if kinds := [kind for kind, is_it in is_of.items() if is_it]:
        raise ConversionError(_KINDS[kinds[0]])
    dtype = DTYPES.get(str(tensor.dtype))
    if dtype is None:
        raise ConversionError(f'a tensor of {tensor.dtype}, which has no counterpart here')
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if dtype.type.__module__ == 'numpy':
            return np.asarray(tensor.numpy())
        import torch

        bits = tensor.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
        return np.asarray(bits.numpy().view(dtype))
    except (TypeError, RuntimeError) as error:
        raise ConversionError(f'a tensor without plain numbers in it: {error}') from error
