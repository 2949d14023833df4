"""A SimpleViT with register tokens, or with normalised queries and keys, goes wherever the others go."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_vit import export_serving, from_pretrained, save_pretrained, to_nnx
from parity_tests.support.reference import QUICK
from parity_tests.support.small_models import MODELS, assert_equal

IMAGES = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)
jit = partial(jax.jit, compiler_options=QUICK)


@pytest.mark.parametrize('fields', [{'num_register_tokens': 3}, {'qk_norm': True, 'num_classes': 16}], ids=list)
def test_starts_as_pytorch_and_goes_anywhere(fields: dict[str, Any], tmp_path: Path) -> None:
    model: Any = MODELS['simple'].clone(**fields)
    variables = jit(model.init)(jax.random.key(0), IMAGES)
    if model.qk_norm:
        gammas = [variables['params']['transformer']['layers_0_0'][name]['gamma'] for name in ('q_norm', 'k_norm')]
        assert_equal(gammas, [np.full((2, 1, 64), 1 / 8, np.float32)] * 2)
    else:
        assert 0.5 < variables['params']['register_tokens'].std() < 1.5
    logits = jit(model.apply)(variables, IMAGES)
    export_serving(tmp_path / 'model.npz', model, variables, platforms=['cpu'])
    assert np.array_equal(jit(to_nnx(model, variables).__call__)(IMAGES), logits)

    folder = tmp_path / 'folder'
    save_pretrained(folder, model, variables)
    same, read = from_pretrained(folder)
    assert same == model
    assert_equal(read, variables)
    larger, read = from_pretrained(folder, image_size=(12, 8), num_classes=0)
    assert jax.eval_shape(larger.apply, read, IMAGES.swapaxes(1, 2)).shape == (2, 16)
    if model.qk_norm:
        with pytest.raises(ValueError, match='num_classes must be dim, 16, or 0 for the pooled features, not 5'):
            from_pretrained(folder, num_classes=5)
    else:
        with pytest.warns(UserWarning, match='The head is new and untrained'):
            _, read = from_pretrained(folder, num_classes=5)
        assert read['params']['linear_head']['kernel'].shape == (16, 5)
