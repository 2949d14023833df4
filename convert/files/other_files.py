"""Files and folders that hold no weights that can be read: what they are, and what to do."""

import re
from collections.abc import Iterable, Mapping

from convert.errors import ConversionError
from convert.files.zip_directory import Record, quote

_TENSORFLOW_INDEX = 0xDB4775248B80FB57.to_bytes(8, 'little')
_PAGE = 'a web page, saved in place of the file: download the file itself'
_UNPACK = 'a compressed file: unpack it first'
_OTHERS = {  # an expression for how a file begins -> what to say of it
    rb'version https://git-lfs': 'a git-lfs pointer to the file, not the file: run `git lfs pull`',
    rb'(?i)<!doctype|<html|<\?xml': _PAGE,
    rb'\x89HDF\r\n': 'an HDF5 file (Keras?), which holds no PyTorch weights',
    rb'model_checkpoint_path': 'the index file of a TensorFlow checkpoint, which holds no PyTorch weights',
    rb'....TFL3': 'a TensorFlow Lite model, which holds no PyTorch weights',
    rb'....ET\d\d': 'an ExecuTorch program: convert the state dict that it was made from',
    rb'\x08[\x03-\x20](\x12.|.{0,40}pytorch)': (
        'an ONNX model? Its weights may have other names, or be folded into others: convert the state dict that it '
        'was exported from'
    ),
    rb'GGUF': 'a GGUF file (llama.cpp), which holds no vision transformer of vit-pytorch',
    rb'7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18': _UNPACK,
    rb'.{257}ustar': (
        'a tar archive: unpack it first. If it is one that torch wrote before 2017, load it there and save it again: '
        'torch.save(state_dict, path)'
    ),
    rb'\0{64}': 'zeros where the data should be, an interrupted download? Copy or download it again',
}


def refuse_file(head: bytes, tail: bytes) -> None:
    """ConversionError for what begins and ends like no checkpoint."""
    for beginning, advice in _OTHERS.items():
        if re.match(beginning, head, re.DOTALL):
            raise ConversionError(advice)
    if tail == _TENSORFLOW_INDEX:
        raise ConversionError('the index of a TensorFlow checkpoint, which holds no PyTorch weights')
    raise ConversionError(f'no checkpoint of a known format; it begins with {head[:16]!r}')


def refuse_archive(records: Mapping[str, Record]) -> None:
    """ConversionError for a zip archive that is neither torch.save's nor an npz."""
    if any(name.endswith('.data/extern_modules') for name in records):
        pickles = ' or '.join(repr(name.partition('/')[2]) for name in records if name.endswith('.pkl'))
        raise ConversionError(
            f'an archive of torch.package, which holds code. If you trust it, save its weights ({pickles}: a package '
            'and a name) and convert those:\n'
            "    model = torch.package.PackageImporter('x.pt').load_pickle('model', 'model.pkl')\n"
            "    torch.save(getattr(model, 'state_dict', lambda: model)(), 'weights.pt')"
        )
    if any(name.endswith('model.weights.h5') for name in records):
        raise ConversionError('a Keras model, which holds no PyTorch weights')
    raise ConversionError(
        f'a zip archive, neither from torch.save nor an npz: it holds {quote(list(records))}. Unpack it, and give the '
        'checkpoint that is in it'
    )


def refuse_parts(names: Iterable[str], where: str) -> None:
    """ConversionError for the names of files that hold a part of each tensor, or another framework's."""
    names = set(names)
    if '.metadata' in names or any(name.endswith('.distcp') for name in names):
        raise ConversionError(
            'the parts that torch.distributed.checkpoint saved. Where torch is, merge them and convert the result:\n'
            f'    python -m torch.distributed.checkpoint.format_utils dcp_to_torch {where} weights.pt'
        )
    if any(re.match(r'(bf16_|fp16_)?zero_pp_rank_|.*_optim_states\.pt$|zero_to_fp32\.py$', name) for name in names):
        raise ConversionError(
            'the parts that DeepSpeed ZeRO saved. Merge them, where deepspeed is, in the folder where it put this '
            'script, and convert weights, a file or a folder:\n'
            '    python zero_to_fp32.py . weights'
        )
    if 'saved_model.pb' in names or any(name.endswith('.data-00000-of-00001') for name in names):
        raise ConversionError('a TensorFlow checkpoint, which holds no PyTorch weights')
    if names & {'manifest.ocdbt', '_CHECKPOINT_METADATA'}:
        raise ConversionError('an Orbax checkpoint, which is in a format of JAX already')
    if {'data.pkl', 'data'} <= names:
        raise ConversionError(
            'the content of a torch zip archive: give the archive, or zip the folder without compression'
        )
