"""A converted folder to a checkpoint that PyTorch loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.conversion import to_torch
from convert.errors import ConversionError, with_article
from flax_vit import from_pretrained
from flax_vit.folders.config import new_config
from flax_vit.folders.saving import write_arrays
from flax_vit.folders.whole_files import appearing_whole


def export(folder: Path, target: Path, *, layout: str | None = None, overwrite: bool = False) -> None:
    """Write the parameters in `folder` to `target`, in the names of where they come from.

    For vit-pytorch and dvit_repo it is a .safetensors or a .pt file, for big_vision an .npz. It appears whole or not at
    all.

    Raises:
        ConversionError: when `target` exists, or has another ending, or when torch is needed and missing.
        OSError: when there is no such folder, and when the disk does not take the file.
    """
    if target.exists() and not overwrite:
        raise ConversionError(f'{target} exists; give another name, or --overwrite.')
    if target.suffix not in {'.safetensors', '.pt', '.pth', '.npz'}:
        raise ConversionError(f'{target.name} should end in .safetensors or .pt, to say which format is wanted.')
    model, variables = from_pretrained(folder)
    if (target.suffix == '.npz') != architecture_of(model).layouts[0].flax:
        wanted = '.safetensors or .pt' if target.suffix == '.npz' else '.npz'
        raise ConversionError(
            f'{target.name} should end in {wanted}: what reads {with_article(type(model).__name__)} reads those.'
        )
    state_dict = to_torch(model, variables, layout=layout)
    with appearing_whole(target) as partial:
        if target.suffix == '.safetensors':
            fields = new_config(model, None)['fields']  # the weights don't tell all of them
            write_arrays(partial, state_dict, {'format': 'pt', 'model_args': json.dumps(fields)})
        elif target.suffix == '.npz':
            with partial.open('wb') as file:
                np.savez(file, **state_dict)  # type: ignore[arg-type]  # these are arrays, and none is allow_pickle
        else:
            _save_pt(state_dict, partial)


def _save_pt(state_dict: dict[str, np.ndarray], path: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "Writing a .pt needs torch: pip install torch. A .safetensors doesn't; PyTorch reads it with "
            'safetensors.torch.load_file.'
        ) from error

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == 'bfloat16':  # numpy's own types don't have it
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    try:
        with path.open('wb') as file:
            torch.save({name: tensor(array) for name, array in state_dict.items()}, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk; torch speaks of positions instead
            raise error.__context__ from None
        raise
