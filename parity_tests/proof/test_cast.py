"""Folders whose parameters were cast: they are proven against PyTorch with its weights cast alike."""

import json
import pathlib
import re
import shlex
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vit_pytorch import deepvit

import convert
from convert.command_line.cli import main
from flax_vit import from_pretrained, save_pretrained


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = deepvit.DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=3, mlp_dim=8)
    torch.save(module.state_dict(), 'deep.pt')

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['flax-vit', *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ('dtype', 'more'),
    [
        ('bfloat16', []),
        ('float16', []),
        ('float64', []),
        ('bfloat16', ['--verify']),
        ('bfloat16', ['--num-classes', '0']),
    ],
)
def test_a_cast_folder_is_proven_against_weights_cast_alike(run: Any, dtype: str, more: list[str]) -> None:
    status, printed, complaint = run('convert', 'deep.pt', 'out', '--param-dtype', dtype, *more)
    assert status == 0, printed + complaint
    (proof,) = re.findall('^prove it: (.*)$', printed, re.MULTILINE)
    _, *words = shlex.split(proof)
    assert '--param-dtype' not in words
    status, printed, complaint = run(*words)
    assert (status, 'RIGHT' in printed) == (0, True), printed + complaint
    with jax.enable_x64(True):
        _, variables = from_pretrained('out')
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {dtype}
    if more == ['--verify']:
        verified = json.loads(pathlib.Path('out', 'config.json').read_text())['source']['verified']
        assert verified['verdict'].startswith('the Flax model computes what PyTorch does')


def test_one_weight_of_a_cast_folder_that_is_another_is_wrong(run: Any) -> None:
    """By one place of bfloat16: the cast does not hide it."""
    assert run('convert', 'deep.pt', 'out', '--param-dtype', 'bfloat16')[0] == 0
    model, variables = from_pretrained('out')
    kernel = np.array(variables['params']['transformer']['layers_0_1']['net_1']['kernel'])
    kernel.view(np.uint16)[0, 0] += 1
    variables['params']['transformer']['layers_0_1']['net_1']['kernel'] = jnp.asarray(kernel)
    save_pretrained('out', model, variables)
    assert run('verify', 'deep.pt', 'out')[0] == 1


def test_weights_rounded_twice_are_wrong(run: Any) -> None:
    """What was rounded to bfloat16 on the way is not the source's cast to float32."""
    model, rounded = convert.from_torch(
        'deep.pt', pool='cls', dropout=0.0, emb_dropout=0.0, channels=3, param_dtype='bfloat16'
    )
    save_pretrained('out', model.clone(param_dtype='float32'), jax.tree.map(lambda a: a.astype(jnp.float32), rounded))
    status, printed, _ = run('verify', 'deep.pt', 'out')
    assert (status, 'rounded to bfloat16' in ' '.join(printed.split())) == (1, True)
