"""A SimpleViT with register tokens, or with normalised queries and keys, goes wherever the others go."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_vit import SimpleViT, from_pretrained, save_pretrained, to_nnx
from parity_tests.support.small_models import MODELS, assert_equal, variables_of

FIELDS: list[dict[str, Any]] = [{'num_register_tokens': 3}, {'qk_norm': True, 'num_classes': 16}]
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)


@pytest.mark.parametrize('fields', FIELDS, ids=['registers', 'qk-norm'])
def test_folders_other_fields_and_nnx(fields: dict[str, Any], tmp_path: Path) -> None:
    model: Any = MODELS['simple'].clone(**fields)
    variables = variables_of(model)
    save_pretrained(tmp_path, model, variables)
    same, read = from_pretrained(tmp_path)
    assert same == model
    assert_equal(read, variables)
    larger, read = from_pretrained(tmp_path, image_size=(12, 8), num_classes=0)
    assert jax.jit(larger.apply)(read, IMAGES.swapaxes(1, 2)).shape == (2, 16)
    logits = jax.jit(model.apply)(variables, IMAGES)
    assert np.array_equal(jax.jit(to_nnx(model, variables).__call__)(IMAGES), logits)
    half = jax.jit(model.clone(dtype='bfloat16').apply)(variables, IMAGES)
    assert 0 < np.abs(half.astype(np.float32) - logits).max() < 0.1 * np.abs(logits).max()
    if model.qk_norm:
        with pytest.raises(ValueError, match='num_classes must be dim, 16, or 0 for the pooled features, not 5'):
            from_pretrained(tmp_path, num_classes=5)
    else:
        assert from_pretrained(tmp_path, num_classes=5, seed=0)[1]['params']['linear_head']['kernel'].shape == (16, 5)


@pytest.mark.parametrize('fields', FIELDS, ids=['registers', 'qk-norm'])
def test_initial_values_are_pytorchs(fields: dict[str, Any]) -> None:
    size: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 16, 'dim': 16, 'depth': 1, 'mlp_dim': 8}
    params: Any = SimpleViT(**{**size, **fields}, heads=3, dim_head=4).init(jax.random.key(0), IMAGES[:, :, :8])[
        'params'
    ]
    if 'qk_norm' in fields:
        for name in ('q_norm', 'k_norm'):
            assert_equal(params['transformer']['layers_0_0'][name]['gamma'], np.full((3, 1, 4), 0.5, np.float32))
    else:
        assert 0.5 < params['register_tokens'].std() < 1.5
