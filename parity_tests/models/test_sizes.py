"""Models by the names of their sizes: as many parameters as PyTorch's. The papers' own: test_official.py."""

import math
from typing import Any

import pytest
import torch

import flax_vit
from convert.architectures import architecture_of
from flax_vit.architectures import sizes_by_name
from flax_vit.parameters import variable_shapes
from parity_tests.support.pages import ROOT


def parameters(model: Any) -> int:
    """How many numbers; one block is traced for all."""
    return sum(math.prod(shape.shape) for shape in variable_shapes(model.clone(scan_layers=True)).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [name for name, (model, _) in sizes_by_name().items() if hasattr(model, 'TRANSFORMER')]
)
def test_as_many_parameters_as_in_pytorch(name: str) -> None:
    model = flax_vit.named(name)
    fields = ('image_size', 'patch_size', 'num_classes', 'dim', 'depth', 'heads', 'mlp_dim')
    with torch.device('meta'):
        module = architecture_of(model).torch_class(model)(**{field: getattr(model, field) for field in fields})
    count = parameters(model)
    assert count == sum(parameter.numel() for parameter in module.parameters())
    assert rows()[name][-1] == f'{count / 1e6:.1f} M'


def test_known_counts() -> None:
    """In millions, without the biases of to_qkv, which vit-pytorch has not."""
    for size, millions in {'ti16': 5.7, 's16': 22.0, 'b16': 86.5, 'l16': 304.3}.items():
        assert round(parameters(flax_vit.named(f'deep_vit_{size}')) / 1e6, 1) == millions


def rows() -> dict[str, list[str]]:
    """docs/sizes.md: image and patch size, dim, depth, heads, mlp_dim, count, by the names that `named` knows."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / 'docs/sizes.md').read_text(encoding='utf-8').splitlines():
        if line.startswith('| `'):
            name, *cells = (cell.strip().strip('`') for cell in line.strip('|').split('|'))
            models = (
                [f'{model}_{name}' for model in ('vit', 'simple_vit', 'deep_vit')] if cells[0].isdigit() else [name]
            )
            sizes = cells[-len(models) - 6 : -len(models)]
            found |= {model: [*sizes, count] for model, count in zip(models, cells[-len(models) :], strict=True)}
    return found


def test_the_page_has_every_size() -> None:
    fields = ('image_size', 'patch_size', 'dim', 'depth', 'heads', 'mlp_dim')
    models = {name: flax_vit.named(name) for name in sizes_by_name()}
    sizes = {name: [str(getattr(model, field)) for field in fields] for name, model in models.items()}
    assert {name: row[:-1] for name, row in rows().items()} == sizes


def test_other_fields() -> None:
    model = flax_vit.named('simple_vit_s32', num_classes=10, image_size=64, dtype='bfloat16')
    assert (model.num_classes, model.image_size, model.patch_size, model.dim) == (10, 64, 32, 384)
    with pytest.raises(ValueError, match="'simple_vit_s8' is not the name of a size; do you mean simple_vit_"):
        flax_vit.named('simple_vit_s8')
    with pytest.raises(ValueError, match=r'the names are (.*, )?deep_vit_readme, deep_vit_ti16'):
        flax_vit.named('')
