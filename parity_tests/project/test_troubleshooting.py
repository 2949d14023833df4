"""docs/troubleshooting.md: every message in its headings is one that is given."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

import flax_vit
from parity_tests.support.pages import ROOT
from parity_tests.support.small_models import variables_of

MODEL: Any = flax_vit.DeepViT(
    image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=2, mlp_dim=4, dropout=0.1
)
IMAGES = np.zeros((1, 8, 8, 3), np.float32)
DIGITS = str(ROOT / 'examples' / 'digits' / 'simple_vit.pt')
WEIGHTS = variables_of(MODEL)
STATE_DICT = flax_vit.to_torch(MODEL, WEIGHTS)
QKV = 'transformer.layers.0.0.to_qkv'


def converted(**changes: Any) -> object:
    """From the state dict with other tensors; None takes one out."""
    return flax_vit.from_torch({name: value for name, value in (STATE_DICT | changes).items() if value is not None})


PROVOKED: dict[str, Callable[[], object]] = {
    'the weights are not enough. Give these arguments: … heads': lambda: flax_vit.from_torch(DIGITS),
    'assumed, as in vit-pytorch: … Pass what you know as arguments.': converted,
    'There are several different models here; choose one.': lambda: flax_vit.from_torch(
        {'model': STATE_DICT, 'ema': {name: value + 1 for name, value in STATE_DICT.items()}}
    ),
    'No layout fits. The nearest is …; the difference:': lambda: converted(cls_token=None),
    'another function, which is not converted': lambda: converted(
        **{'patch_transformer.layers.0.0.fn.mix_heads_pre_attn': np.eye(2)}
    ),
    'There are LoRA adapters here': lambda: converted(
        **{f'{QKV}.lora_A': np.ones((2, 8)), f'{QKV}.lora_B': np.ones((384, 2))}
    ),
    'neither a folder here nor a name on the Hugging Face Hub': lambda: flax_vit.from_pretrained('no-such-folder'),
    'these have the shape …': lambda: MODEL.apply(WEIGHTS, IMAGES[:, :7]),
    'may have their … channels last or first': lambda: MODEL.clone(channels=8).init(
        jax.random.key(0), np.zeros((1, 8, 8, 8), np.float32)
    ),
    'needs PRNG for "dropout"': lambda: MODEL.apply(WEIGHTS, IMAGES, train=True),
    'Attempted boolean conversion of traced array': lambda: jax.jit(MODEL.apply)(WEIGHTS, IMAGES, train=True),
}
# Provoked, and looked at, where there is a model to verify, or a package missing.
ELSEWHERE = {
    'matches if heads=…': 'proof/test_causes.py',
    'the same function, computed too coarsely': 'proof/test_verify.py',
    "pip install 'flax-vit[…]'": 'project/test_package.py',
}
HEADINGS = re.findall(r'^### `(.*)`$', (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8'), re.MULTILINE)


def test_every_heading_is_looked_at() -> None:
    assert [*PROVOKED, *ELSEWHERE] == HEADINGS


@pytest.mark.parametrize('heading', PROVOKED)
def test_it_is_said(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)  # users have no annotations checked
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its words are what counts
            PROVOKED[heading]()
    assert re.search('.*'.join(re.escape(piece.strip()) for piece in heading.split('…')), str(caught.value), re.DOTALL)


@pytest.mark.parametrize(('heading', 'test'), ELSEWHERE.items())
def test_it_is_looked_at_elsewhere(heading: str, test: str) -> None:
    assert heading.split('…')[0] in (ROOT / 'parity_tests' / test).read_text()
