"""What old releases of vit-pytorch compute, by their own source: it makes the golden files, and the reference of
test_releases.py. `python -m parity_tests.golden.make` fetches the releases and writes the files anew.

NAME.pt is a state dict as torch saves it; NAME.npz holds the images (batch, channels, height, width), the logits and
the pooled features that the release's module computes of them in float64, with these weights.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from flax_vit.simple_vit import posemb_sincos_2d
from parity_tests.support.reference import perturbed

FOLDER = Path(__file__).parent
# All sizes differ that could be taken for each other. DeepViT's images are square.
FIELDS: dict[str, Any] = {
    'num_classes': 10,
    'dim': 8,
    'depth': 2,
    'heads': 3,
    'mlp_dim': 7,
    'channels': 2,
    'dim_head': 5,
}
FIELDS_OF: dict[str, dict[str, Any]] = {
    'SimpleViT': FIELDS | {'image_size': (4, 9), 'patch_size': (2, 3)},
    'DeepViT': FIELDS | {'image_size': 6, 'patch_size': 3, 'pool': 'mean', 'dropout': 0.2, 'emb_dropout': 0.3},
    # 25 patches: early releases want more than 16
    'ViT': FIELDS | {'image_size': 10, 'patch_size': 2, 'pool': 'mean', 'dropout': 0.2, 'emb_dropout': 0.3, 'depth': 1},
}
# What releases of ViT did not take yet: heads shared `dim`, the class token was what is pooled.
BEFORE: dict[tuple[int, ...], dict[str, Any]] = {
    (0, 2, 2): {'dropout': None, 'emb_dropout': None},
    (0, 4, 0): {'dim_head': None, 'heads': 2},
    (0, 5, 0): {'pool': None},
}
# Golden file -> the release that makes it, its class, and the file where that has another name.
GOLDEN: dict[str, tuple[str, ...]] = {
    'S0-0.35.0': ('0.35.0', 'SimpleViT'),
    'S0-0.40.2': ('0.40.2', 'SimpleViT'),
    'B-cos': ('0.40.2', 'SimpleViT'),
    'S1-1.2.4': ('1.2.4', 'SimpleViT'),
    'S1-1.2.9': ('1.2.9', 'SimpleViT'),
    'S2-1.4.0': ('1.4.0', 'SimpleViT'),
    'S3-1.4.1': ('1.4.1', 'SimpleViT'),
    'S3R-1.5.0': ('1.5.0', 'SimpleViT', 'simple_vit_with_register_tokens'),
    'S3Q-1.4.2': ('1.4.2', 'SimpleViT', 'simple_vit_with_qk_norm'),
    'D0-0.9.0': ('0.9.0', 'DeepViT'),
    'D0-0.40.2': ('0.40.2', 'DeepViT'),
    'D1-1.4.2': ('1.4.2', 'DeepViT'),
    'D2-1.4.3': ('1.4.3', 'DeepViT'),
    'V0a-0.2.0': ('0.2.0', 'ViT'),
    'V0b-0.2.1': ('0.2.1', 'ViT'),
    'V0-0.2.7': ('0.2.7', 'ViT'),
    'V1-0.6.5': ('0.6.5', 'ViT'),
    'V2-0.6.8': ('0.6.8', 'ViT'),
    'V3-0.9.3': ('0.9.3', 'ViT'),
    'V4-0.16.0': ('0.16.0', 'ViT'),
    'V5-1.2.9': ('1.2.9', 'ViT'),
    'V6-1.15.7': ('1.15.7', 'ViT'),
    'V7-1.16.0': ('1.16.0', 'ViT'),
    'V8-1.16.1': ('1.16.1', 'ViT'),
}
# B-cos/B-cos-v2 gave the parts of S0 these names.
B_COS = {
    'to_patch_embedding.1.': 'to_patch_embedding.linear.',
    'transformer.layers.0.0.': 'transformer.encoder_0.attn.',
    'transformer.layers.0.1.net.0.': 'transformer.encoder_0.ff.net.norm.',
    'transformer.layers.0.1.net.1.': 'transformer.encoder_0.ff.net.linear1.',
    'transformer.layers.0.1.net.3.': 'transformer.encoder_0.ff.net.linear2.',
    'transformer.layers.1.0.': 'transformer.encoder_1.attn.',
    'transformer.layers.1.1.net.0.': 'transformer.encoder_1.ff.net.norm.',
    'transformer.layers.1.1.net.1.': 'transformer.encoder_1.ff.net.linear1.',
    'transformer.layers.1.1.net.3.': 'transformer.encoder_1.ff.net.linear2.',
    'linear_head.0.': 'linear_head.norm.',
    'linear_head.1.': 'linear_head.linear.',
}


def arguments_of(model: str, version: str | None, **others: Any) -> dict[str, Any]:
    """What that release's class is built with."""
    arguments = FIELDS_OF[model] | others
    if model == 'ViT' and version:
        for border, changes in BEFORE.items():
            arguments |= changes if tuple(map(int, version.split('.'))) < border else {}
    return {name: value for name, value in arguments.items() if value is not None}


def download(folder: Path, version: str | None = None) -> Path:
    """The wheel of a vit-pytorch release, the newest without `version`. Raises SubprocessError, with pip's words."""
    name = f'vit-pytorch=={version}' if version else 'vit-pytorch'
    pip = [sys.executable, '-m', 'pip', '--retries', '1', '--disable-pip-version-check']
    pip += ['download', '--no-deps', '--quiet', '--dest', str(folder)]
    subprocess.run([*pip, name], check=True, capture_output=True, text=True, timeout=60)
    (wheel,) = folder.glob(f'vit_pytorch-{version or "*"}-*.whl')
    return wheel


def architecture(wheel: Path, name: str, file: str | None = None) -> Any:
    """The class of that name of that release. Its source runs alone, under the name it has in vit-pytorch."""
    file = file or {'SimpleViT': 'simple_vit', 'DeepViT': 'deepvit', 'ViT': 'vit'}[name]
    with zipfile.ZipFile(wheel) as archive:
        if f'vit_pytorch/{file}.py' not in archive.namelist():  # ViT's before 0.10
            file = 'vit_pytorch'
        source = archive.read(f'vit_pytorch/{file}.py')
    module = ModuleType(f'vit_pytorch.{file}')
    exec(compile(source, f'{wheel.name}/{file}.py', 'exec'), vars(module))
    if name == 'SimpleViT':  # the port's table, because PyTorch's depends on the processor in the last bits
        vars(module)['posemb_sincos_2d'] = port_table
    return getattr(module, name)


def port_table(*arguments: Any, **sizes: int) -> torch.Tensor:
    """In place of `posemb_sincos_2d`, which takes images of patches (and `dim`, at first), or since 1.2.5 sizes."""
    if sizes:
        return torch.from_numpy(posemb_sincos_2d(sizes['h'], sizes['w'], sizes['dim']))
    patches = arguments[0]
    return torch.from_numpy(posemb_sincos_2d(*patches.shape[1:])).to(patches.dtype)


def reference(module: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """What a module computes in float64: its logits, and the features that its head takes."""
    head = module.get_submodule('mlp_head' if hasattr(module, 'mlp_head') else 'linear_head')
    taken: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    with torch.no_grad():
        logits = module.double()(torch.from_numpy(images))
    hook.remove()
    return {'logits': logits.numpy(), 'features': taken[0].numpy()}


def random_images(fields: Mapping[str, Any], batch: int = 3) -> np.ndarray:
    size = fields['image_size']
    sides = size if isinstance(size, tuple) else (size, size)
    return np.random.default_rng(0).standard_normal((batch, fields['channels'], *sides))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (version, model, *file) in GOLDEN.items():
            fields = arguments_of(model, version)
            module = perturbed(architecture(download(Path(folder), version), model, *file)(**fields))
            state_dict = dict(module.state_dict())
            if name == 'B-cos':
                state_dict = {
                    new + key.removeprefix(old): tensor
                    for key, tensor in state_dict.items()
                    for old, new in B_COS.items()
                    if key.startswith(old)
                }
            torch.save(state_dict, FOLDER / f'{name}.pt')
            images = random_images(fields)
            arrays: dict[str, Any] = {'images': images, **reference(module, images)}
            np.savez_compressed(FOLDER / f'{name}.npz', **arrays)


if __name__ == '__main__':
    main()
