"""The exported file, run by a process that has JAX and nothing of ours."""

import pathlib
import re
import subprocess
import sys
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from convert.command_line.cli import main
from flax_vit import DeepViT, SimpleViT, ViT, export_serving, save_pretrained

SIZES: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 1, 'heads': 2}
MODELS = [DeepViT(**SIZES, mlp_dim=8), SimpleViT(**SIZES, mlp_dim=8), ViT(**SIZES, mlp_dim=8)]
IMAGES = np.random.default_rng(0).standard_normal((5, 8, 8, 3), np.float32)
LOADER, *_ = re.findall(
    r'```python\n(import jax\n.*?)```',
    (pathlib.Path(__file__).parents[2] / 'docs' / 'serving.md').read_text(encoding='utf-8'),
    re.DOTALL,
)
SERVER = f"""
import sys
for package in ('flax', 'flax_vit', 'convert', 'torch', 'safetensors', 'einops', 'jaxtyping'):
    sys.modules[package] = None
import numpy as np
for number in range(int(sys.argv[1])):
    images = np.load('images.npy')
    {LOADER.replace('digits-vit.npz', '{number}.npz').replace("'{", "f'{").replace(chr(10), chr(10) + '    ')}
    np.save(f'{{number}}-1.npy', np.asarray(serve(weights, images[:1])))
    np.save(f'{{number}}-5.npy', np.asarray(serve(weights, images)))
"""


@cache
def initial(model: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(0), IMAGES)


def variables_of(model: Any, dtype: str = 'float32') -> Any:
    return jax.tree.map(lambda array: array.astype(dtype), initial(model))


def test_it_runs_where_only_jax_is(tmp_path: pathlib.Path) -> None:
    """Both models, each with float32 and bfloat16 weights, for batches of 1 and 5."""
    cases = [(model, variables_of(model, dtype)) for model in MODELS for dtype in ('float32', 'bfloat16')]
    np.save(tmp_path / 'images.npy', IMAGES)
    for number, (model, variables) in enumerate(cases):
        with jax.enable_x64(number % 2 == 0):  # as on the command line
            export_serving(tmp_path / f'{number}.npz', model, variables)
    command = [sys.executable, '-W', 'error', '-c', SERVER, str(len(cases))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, (model, variables) in enumerate(cases):
        for batch in (1, 5):
            served = np.load(tmp_path / f'{number}-{batch}.npy')
            expected = np.asarray(jax.jit(model.apply)(variables, IMAGES[:batch]))
            assert served.dtype == np.float32
            # The same float32 products in a program that XLA may fuse otherwise: rounding of a few dozen sums.
            np.testing.assert_allclose(served, expected, rtol=0, atol=32 * 2.0**-24 * np.abs(expected).max())


def test_the_weights_are_beside_the_program(tmp_path: pathlib.Path) -> None:
    model = DeepViT(**SIZES | {'dim': 64}, mlp_dim=256)
    variables = variables_of(model)
    export_serving(tmp_path / 'deep.npz', model, variables, platforms=['cpu'], image_size=(4, 8))
    with np.load(tmp_path / 'deep.npz') as file:
        kernel = file['params/mlp_head_1/kernel']
        program = jax.export.deserialize(bytearray(file['program']))
        assert len(file['program']) < sum(array.nbytes for array in jax.tree.leaves(variables)) / 4
    assert np.array_equal(kernel, variables['params']['mlp_head_1']['kernel'])
    assert program.platforms == ('cpu',)
    assert program.in_avals[-1].shape[1:] == (4, 8, 3)


def test_bad_input_is_told_and_nothing_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = MODELS[1], tmp_path / 'simple.npz'
    variables = variables_of(model)
    with pytest.raises(ValueError, match='platforms must be some of cpu, cuda, rocm, tpu, not gpu'):
        export_serving(target, model, variables, platforms=['cpu', 'gpu'])
    with pytest.raises(ValueError, match='takes images of shape'):
        export_serving(target, model, variables, image_size=4)
    with jax.enable_x64(True), pytest.raises(ValueError, match='are float64'):
        export_serving(target, model, variables_of(model, 'float64'))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'flatbuffers', None)
        patch.delitem(sys.modules, 'jax._src.export.serialization', raising=False)
        with pytest.raises(ValueError, match=r'flax-vit\[serving\]'):
            export_serving(target, model, variables)
    with pytest.raises(ValueError, match='computes in float64'):
        export_serving(target, model.clone(dtype='float64'), variables)
    for size in (0, (0, 0)):
        with pytest.raises(ValueError, match='takes images of shape'):
            export_serving(target, model, variables, image_size=size)
    with pytest.raises(ValueError, match='variables of this SimpleViT are not the parameters of this model'):
        export_serving(target, model, variables_of(MODELS[0]))
    with pytest.raises(FileNotFoundError, match='nowhere is no folder: make it first'):
        export_serving(tmp_path / 'nowhere' / 'simple.npz', model, variables)
    assert not list(tmp_path.iterdir())
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r'is a folder; give the name of a file, such as .*/model\.npz'):
            export_serving(tmp_path, model, variables, overwrite=overwrite)
    target.write_text('mine')
    with pytest.raises(FileExistsError, match='exists'):
        export_serving(target, model, variables)
    assert target.read_text() == 'mine'


def test_on_the_command_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(tmp_path / 'out', MODELS[0], variables_of(MODELS[0]))
    target = tmp_path / 'deep.npz'
    arguments = ['serve-export', str(tmp_path / 'out'), str(target), '--platform', 'cpu', '--platform', 'tpu']
    overwrite = ['--overwrite', '--param-dtype', 'bfloat16', '--image-size', '4x8']
    for more, status in (([], 0), ([], 2), (['--overwrite', '--dtype', 'bf16'], 2), (overwrite, 0)):
        monkeypatch.setattr(sys, 'argv', ['flax-vit', *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
    printed, complaint = capsys.readouterr()
    assert 'cpu, tpu' in printed
    assert 'dtype must be float64, float32, float16 or bfloat16' in ' '.join(complaint.split())
    with np.load(target) as file:
        assert file['params/cls_token'].dtype == np.uint16
        assert jax.export.deserialize(bytearray(file['program'])).in_avals[-1].shape[1:] == (4, 8, 3)
