"""Folders: what save_pretrained writes, from_pretrained reads, at any moment and whatever else is there."""

import contextlib
import errno
import json
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import flax_vit.folders.pretrained
from flax_vit import DeepViT, PretrainedWarning, from_pretrained, save_pretrained
from flax_vit.checks import pair
from flax_vit.folders.config import read_config
from flax_vit.folders.pretrained import read_golden
from parity_tests.support.small_models import MODELS, assert_equal, variables_of


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', MODELS)
def test_what_is_saved_is_read(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    model = MODELS[name].clone(param_dtype=jnp.dtype(dtype), dtype=jnp.dtype('bfloat16'), precision='highest')
    variables = variables_of(model)
    save_pretrained(tmp_path / 'out', model, variables, source={'from': 'here'})
    read, read_variables = from_pretrained(tmp_path / 'out')
    assert read == model
    assert_equal(read_variables, variables)
    assert read_config(tmp_path / 'out')['source'] == {'from': 'here'}


HIGH, HIGHEST = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'precision': HIGHEST},
        {'precision': (HIGH, HIGHEST)},
        {'precision': ('high', 'highest')},
        {'precision': 'BF16_BF16_F32', 'dtype': jnp.float16},
        {'dim': np.int64(16), 'heads': np.int32(2), 'dtype': 'bfloat16'},
    ],
    ids=str,
)
@pytest.mark.usefixtures('unchecked')
def test_every_field_is_read_as_it_was(fields: Any, tmp_path: pathlib.Path) -> None:
    model = MODELS['simple'].clone(**fields)
    save_pretrained(tmp_path, model, variables_of(model))
    read, _ = from_pretrained(tmp_path)
    assert (read, hash(read)) == (model, hash(model))
    assert type(read.precision) is type(model.precision)


@pytest.mark.usefixtures('unchecked')
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    model, variables = MODELS['simple'], variables_of(MODELS['simple'])
    preset = model.clone(precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32)
    refused: list[tuple[Any, Any, str]] = [
        (preset, {}, r'precision=.*DotAlgorithmPreset.* cannot be kept in config\.json'),
        (model, {'source': {'files': {1, 2}}}, 'source must be JSON .*set'),
        (model, {'source': '\ud800'}, 'source must be JSON'),
        (model, {'golden': {'names': np.array(['a', None])}}, 'golden must be arrays that safetensors can keep'),
        (model, {'golden': [1]}, r'golden must be arrays by name, not \[1\]'),
        (model, {'max_shard_size': 0}, 'max_shard_size must be a number of bytes from 1 up, not 0'),
    ]
    for model, arguments, words in refused:
        with pytest.raises(ValueError, match=words):
            save_pretrained(tmp_path / 'out', model, variables, **arguments)
    with pytest.raises(ValueError, match=r'params/0: the shape is .*, expected nothing'):
        save_pretrained(tmp_path / 'out', model, {'params': {0: np.zeros(3)}})
    assert not (tmp_path / 'out').exists()


def test_a_computation_in_float64_is_done_in_float32_and_said_so_once(tmp_path: pathlib.Path) -> None:
    model = MODELS['simple'].clone(dtype='float64')
    save_pretrained(tmp_path, model, variables_of(MODELS['simple']))
    with pytest.warns(PretrainedWarning, match='float64 computations are rounded to float32') as said:
        read, variables = from_pretrained(tmp_path)
    assert (len(said), read) == (1, model.clone(dtype='float32'))
    read.apply(variables, np.zeros((1, 8, 12, 3), np.float32))
    assert from_pretrained(tmp_path, dtype='float32')[0] == read
    with pytest.raises(ValueError, match=r'dtype=float64 needs 64-bit mode: .*jax_enable_x64'):
        from_pretrained(tmp_path, dtype='float64')
    with jax.enable_x64(True):
        assert from_pretrained(tmp_path)[0] == model


def test_float64_is_kept_or_said_to_be_rounded(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        model = MODELS['simple'].clone(param_dtype=jnp.dtype('float64'))
        variables = variables_of(model)
        save_pretrained(tmp_path, model, variables)
        assert_equal(from_pretrained(tmp_path)[1], variables)
    with pytest.warns(UserWarning, match='float64 parameters are rounded to float32'):
        from_pretrained(tmp_path)


def test_overrides(tmp_path: pathlib.Path) -> None:
    save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']))
    model, variables = from_pretrained(tmp_path, dtype='bfloat16', param_dtype='float16', dropout=0.5)
    assert (model.dtype, model.param_dtype, model.dropout) == (jnp.bfloat16, jnp.float16, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float16')}
    with pytest.raises(ValueError, match=r'DeepViT has no field colour; its fields are .*pool, '):
        from_pretrained(tmp_path, colour='red')
    with pytest.raises(ValueError, match=r'DeepViT has no field drop_out; do you mean dropout\?'):
        from_pretrained(tmp_path, drop_out=0.5)


def test_one_model_replaces_another(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple'], seed))
    assert_equal(from_pretrained(tmp_path)[1], variables_of(MODELS['simple'], 1))
    assert len(list(tmp_path.iterdir())) == 2
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        (tmp_path / 'config.json').stat().st_mode & 0o777
    }


class Kill:
    """Ends a save before its n-th change of the disk, and lets nothing be mended after that."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left, self.dead = after, False
        for owner, name in [(pathlib.Path, name) for name in ('touch', 'write_text', 'chmod', 'replace', 'unlink')] + [
            (sys.modules[save_pretrained.__module__], 'save_file')
        ]:
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, change: Any) -> Any:
        def counting(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            self.dead = self.left < 0
            if self.dead:
                raise KeyboardInterrupt
            return change(*arguments, **more)

        return counting


def test_a_save_killed_at_any_moment_leaves_the_old_model_or_the_new(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (variables_of(MODELS[name]) for name in ('simple', 'deep'))
    seen = []
    for moment in range(99):
        folder = tmp_path / str(moment)
        save_pretrained(folder, MODELS['simple'], old, source={'from': 'old'}, max_shard_size=9000)
        with monkeypatch.context() as patch:
            kill = Kill(patch, moment)
            with contextlib.suppress(KeyboardInterrupt):
                save_pretrained(folder, MODELS['deep'], new, source={'from': 'new'}, max_shard_size=9000)
        model, variables = from_pretrained(folder)
        name = 'deep' if isinstance(model, DeepViT) else 'simple'
        assert model == MODELS[name]
        assert_equal(variables, {'simple': old, 'deep': new}[name])
        card = folder / 'README.md'
        assert not card.exists() or type(model).__name__ in card.read_text()
        seen.append(name)
        save_pretrained(folder, MODELS['simple'], old)  # nothing left is in the way
        assert len(list(folder.iterdir())) == 2
        if not kill.dead:
            break
    assert seen == sorted(seen, reverse=True)
    assert seen.count('simple') > 10
    assert seen.count('deep') > 3


def test_what_is_renamed_is_on_the_disk_and_so_are_names_before_old_weights_go(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    synced: set[int] = set()  # by inode
    fsync, replace, unlink = os.fsync, pathlib.Path.replace, pathlib.Path.unlink

    def syncing(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replacing(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        assert path.stat().st_ino in synced
        assert target.name != 'config.json' or tmp_path.stat().st_ino in synced  # the names of the weights
        synced.discard(tmp_path.stat().st_ino)
        return replace(path, target)

    def unlinking(path: pathlib.Path, missing_ok: bool = False) -> None:
        assert not path.exists() or tmp_path.stat().st_ino in synced
        unlink(path, missing_ok)

    monkeypatch.setattr(os, 'fsync', syncing)
    monkeypatch.setattr(pathlib.Path, 'replace', replacing)
    monkeypatch.setattr(pathlib.Path, 'unlink', unlinking)
    save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']), source={'from': 'here'})
    assert len(list(tmp_path.glob('model-*'))) == 1


def test_many_save_and_read_at_once(tmp_path: pathlib.Path) -> None:
    saved = {name: variables_of(model) for name, model in MODELS.items()}

    def save(name: str) -> None:
        save_pretrained(tmp_path, MODELS[name], saved[name], source={'from': name}, max_shard_size=4000)

    def read(_: int) -> None:
        model, variables = from_pretrained(tmp_path)
        assert_equal(variables, saved['deep' if isinstance(model, DeepViT) else 'simple'])

    save('simple')
    with ThreadPoolExecutor(8) as threads:
        tasks = [threads.submit(save, name) for name in ('deep', 'simple') * 4]
        tasks += [threads.submit(read, number) for number in range(8)]
    for task in tasks:
        task.result()
    read(0)
    named = {file['file'] for file in read_config(tmp_path)['weights']}
    assert {path.name for path in tmp_path.iterdir()} == named | {'config.json', 'README.md'}


FORKED = """
import fcntl, os, signal
from pathlib import Path
from flax_vit.folders.whole_files import locked
with locked(Path()):
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
try:
    fcntl.flock(os.open('.', os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
finally:
    os.kill(child, signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='there are neither forks nor locks of folders')
def test_the_lock_ends_with_the_save_also_if_a_process_was_forked_meanwhile(tmp_path: pathlib.Path) -> None:
    ended = subprocess.run([sys.executable, '-c', FORKED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize('check', [True, False])
def test_a_save_between_the_configuration_and_the_weights(
    check: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    others = iter([MODELS['deep']])

    def then_saved(folder: pathlib.Path) -> Any:
        config = read_config(folder)
        for model in others:
            save_pretrained(folder, model, variables_of(model))
        return config

    monkeypatch.setattr(flax_vit.folders.pretrained, 'read_config', then_saved)
    model, variables = from_pretrained(tmp_path, check=check)
    assert model == MODELS['deep']
    assert_equal(variables, variables_of(model))
    for weights in tmp_path.glob('model-*'):
        weights.unlink()
    with pytest.raises(FileNotFoundError, match='model-'):
        from_pretrained(tmp_path, check=check)


def test_a_save_that_fails_cleans_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[save_pretrained.__module__], 'save_file', interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_model_and_its_card(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file it is that does not fit: all are written before one is replaced."""
    folder = tmp_path / 'out'
    saved = {name: variables_of(model) for name, model in MODELS.items()}
    save_pretrained(folder, MODELS['simple'], saved['simple'], source={'from': 'old'})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused = []
    for room in range(99):
        left = iter(range(room))

        def limited(write: Any, left: Any = left) -> Any:
            def writing(*arguments: Any, **more: Any) -> Any:
                if next(left, None) is None:
                    raise OSError(errno.ENOSPC, 'No space left on device')
                return write(*arguments, **more)

            return writing

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, 'write_text', limited(pathlib.Path.write_text))
            saving = sys.modules[save_pretrained.__module__]
            patch.setattr(saving, 'save_file', limited(saving.save_file))
            try:
                save_pretrained(folder, MODELS['deep'], saved['deep'], source={'from': 'new'}, max_shard_size=9000)
                break
            except OSError as error:
                refused.append((error.errno, pathlib.Path(error.filename).parent))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(refused) > 4
    assert set(refused) == {(errno.ENOSPC, folder)}
    assert 'DeepViT' in (folder / 'README.md').read_text()
    assert_equal(from_pretrained(folder)[1], saved['deep'])


@pytest.mark.parametrize('name', ['README.md', 'config.json', 'model-0123456789ab.safetensors'])
def test_folders_where_files_belong_are_left_alone(name: str, tmp_path: pathlib.Path) -> None:
    if name == 'README.md':
        save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf'holds other files \({re.escape(name)}\)'):
        save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize('folder', [5, b'out', None])
@pytest.mark.usefixtures('unchecked')
def test_what_is_no_folder(folder: Any) -> None:
    with pytest.raises(ValueError, match=r'folder must be a path, or a name on .*, not'):
        from_pretrained(folder)


def test_weights_in_several_files(tmp_path: pathlib.Path) -> None:
    model, variables = MODELS['deep'], variables_of(MODELS['deep'])
    golden = {'images': np.arange(6.0), 'one number': np.array(3.0)}
    save_pretrained(tmp_path, model, variables, golden=golden, max_shard_size=2000)
    files = [tmp_path / file['file'] for file in read_config(tmp_path)['weights']]
    assert len(files) > 3
    assert sorted(files) == sorted(tmp_path.glob('model-*'))
    contents = [load_file(file) for file in files]
    sizes = [sum(array.nbytes for array in arrays.values()) for arrays in contents]
    assert all(size <= 2000 or len(arrays) == 1 for size, arrays in zip(sizes, contents, strict=True))
    assert all(one + other > 2000 for one, other in pairwise(sizes))
    assert_equal(from_pretrained(tmp_path)[1], variables)
    assert_equal(read_golden(tmp_path), golden)
    assert read_golden(tmp_path)['one number'].shape == ()
    save_pretrained(tmp_path, model, variables)
    assert len(list(tmp_path.glob('model-*'))) == 1


def test_the_first_format_is_still_read(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    save_pretrained(tmp_path, MODELS['simple'], variables)
    config = json.loads((tmp_path / 'config.json').read_text())
    (weights,) = config['weights']
    (tmp_path / 'config.json').write_text(json.dumps(config | {'format': 'flax_vit 1', 'weights': weights}))
    assert read_config(tmp_path)['weights'] == [weights]
    assert_equal(from_pretrained(tmp_path)[1], variables)


def test_the_card_says_what_is_known(tmp_path: pathlib.Path) -> None:
    source = {'files': {'a|b`c.pt': 'ab12'}, 'key': None, 'dtypes': ['float32'], 'layout': {'id': 'D2'}}
    verified = {'time': '2030-01-01', 'verdict': 'they agree.', 'criterion': 'right within 1.', 'parts': [1, 2]}
    save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']), source=source | {'verified': verified})
    card = (tmp_path / 'README.md').read_text()
    (digest,) = (file['sha256'] for file in read_config(tmp_path)['weights'])
    header = ('library_name: flax_vit', 'pipeline_tag: image-classification')
    origin = ('| `files` | `` a\\|b`c.pt ``: `ab12` |', '2030-01-01: they agree. The measure: right within 1.')
    for words in (*header, *origin, f'`{digest}`', '| `pool` | `mean` |', '(batch, 8, 8, 3) -> logits (batch, 3)'):
        assert words in card, words
    assert 'parts' not in card
    save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']))
    assert not (tmp_path / 'README.md').exists()  # a card of another model would be false


def test_the_card_of_channels_first(tmp_path: pathlib.Path) -> None:
    model = MODELS['simple'].clone(image_format='channels_first')
    save_pretrained(tmp_path, model, variables_of(model), source={'trained': 'here'})
    (height, width), channels = pair(model.image_size), model.channels
    assert f'floats (batch, {channels}, {height}, {width})' in (tmp_path / 'README.md').read_text()


def test_a_configuration_of_a_hundred_thousand_lists(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'config.json').write_text('[' * 200_000)
    with pytest.raises(ValueError, match='is not the configuration of a model'):
        from_pretrained(tmp_path)


def test_a_card_that_was_edited_is_kept(tmp_path: pathlib.Path) -> None:
    page = tmp_path / 'README.md'
    for name in ('simple', 'deep'):  # what nobody has touched is replaced
        save_pretrained(tmp_path, MODELS[name], variables_of(MODELS[name]), source={'from': ('training', 1)})
        assert type(MODELS[name]).__name__ in page.read_text()
    renamed = page.read_text().replace('this/folder', 'owner/name')  # as push_to_hub writes it
    page.write_text(renamed)
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']), source={'from': 'training'})
    assert 'SimpleViT' in page.read_text()
    for text in (page.read_text() + 'Mine.', 'Mine, of SimpleViT'):
        page.write_text(text)
        save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']), source={'from': 'training'})
        save_pretrained(tmp_path, MODELS['deep'], variables_of(MODELS['deep']))
        assert page.read_text() == text


def test_the_card_of_another_version_is_replaced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables = MODELS['simple'], variables_of(MODELS['simple'])
    with monkeypatch.context() as other:
        other.setattr('flax_vit.folders.saving.card', lambda config: "Other words: from_pretrained('this/folder')\n")
        save_pretrained(tmp_path, model, variables, source={'from': 'training'})
    assert 'Other words' in (tmp_path / 'README.md').read_text()
    save_pretrained(tmp_path, model, variables, source={'from': 'training'})
    assert 'Other words' not in (tmp_path / 'README.md').read_text()


def test_only_own_names_are_taken_for_own(tmp_path: pathlib.Path) -> None:
    model, variables = MODELS['simple'], variables_of(MODELS['simple'])
    save_pretrained(tmp_path, model, variables)
    for name in ('model-00001-of-00002.safetensors', 'thesis.incomplete', 'model-best.safetensors'):
        (tmp_path / name).write_text('mine')
        with pytest.raises(ValueError, match=rf'holds other files \({name}\); give'):
            save_pretrained(tmp_path, model, variables)
        assert (tmp_path / name).read_text() == 'mine'
        (tmp_path / name).unlink()
    for name in (
        'model-0123456789ab.safetensors',
        'model-new.safetensors',
        'model-new.safetensors.0a1b2c3d.incomplete',
        'model.safetensors.incomplete',  # of the first format
        'config.json.incomplete',
        '.tmp0aB1cD',  # safetensors writes to such a file and renames it
        'README.md.0a1b2c3d.incomplete',
    ):
        (tmp_path / name).touch()
    (tmp_path / '.gitattributes').touch()
    (tmp_path / '.git').mkdir()
    save_pretrained(tmp_path, model, variables)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:2] + left[2:3] == ['.git', '.gitattributes', 'config.json']
    assert len(left) == 4


def test_other_peoples_files_are_left_alone(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match=r'holds other files .thesis\.txt'):
        save_pretrained(tmp_path / 'folder', MODELS['simple'], variables)
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match='not the configuration of a model'):
        save_pretrained(tmp_path / 'hub', MODELS['simple'], variables)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'README.md').write_text('mine')
    with pytest.raises(ValueError, match=r'holds other files .README\.md'):
        save_pretrained(tmp_path / 'notes', MODELS['simple'], variables)
    with pytest.raises(ValueError, match='is a file'):
        save_pretrained(tmp_path / 'folder' / 'thesis.txt', MODELS['simple'], variables)
    assert (tmp_path / 'folder' / 'thesis.txt').read_text() == 'years of work'


def test_wrong_variables_are_not_saved(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    with pytest.raises(ValueError, match=r"\{'params': …\}"):
        save_pretrained(tmp_path / 'out', MODELS['simple'], variables['params'])
    with pytest.raises(ValueError, match='linear_head/bias'):
        save_pretrained(tmp_path / 'out', MODELS['simple'].clone(num_classes=4), variables)
    whole = jax.tree.map(lambda array: array.astype(np.int8), variables)
    with pytest.raises(ValueError, match=r'should be float64, .*; not so:\n  params/linear_head/bias: int8'):
        save_pretrained(tmp_path / 'out', MODELS['simple'], whole)
    with pytest.raises(ValueError, match=r'must be one of .*SimpleViT, ViT, not a Dense'):
        save_pretrained(tmp_path / 'out', nn.Dense(3), variables)
    assert not (tmp_path / 'out').exists()


def test_damage_is_noticed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'config\.json'):
        from_pretrained(tmp_path)
    (tmp_path / 'vit.pt').touch()
    with pytest.raises(FileNotFoundError, match=r'vit\.pt is a file, not a folder .* is for from_torch'):
        from_pretrained(tmp_path / 'vit.pt')
    (tmp_path / 'vit.pt').unlink()
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    (weights,) = tmp_path.glob('model-*.safetensors')
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match='is damaged'):
        from_pretrained(tmp_path)
    assert np.isfinite(jax.tree.leaves(from_pretrained(tmp_path, check=False)[1])[0]).all()
    weights.write_bytes(data[:-1])
    with pytest.raises(ValueError, match='is damaged'):
        from_pretrained(tmp_path, check=False)
    config = json.loads((tmp_path / 'config.json').read_text())
    (file,) = config['weights']
    lacking = {name: value for name, value in config['fields'].items() if name != 'heads'}
    changes: list[dict[str, Any]] = [
        {'fields': lacking},
        {'fields': config['fields'] | {'heads': 'two'}},
        {'fields': None},
        {'format': 'flax_vit 99'},
        {'model': 'AnotherViT'},
        {'fields': {'colour': 'red'}},
        {'weights': []},
        {'weights': [file | {'file': '../model-x.safetensors'}]},
        {'weights': [{'file': file['file']}]},
    ]
    for change in changes:
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r'config\.json is not the configuration'):
            from_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(config | {'fields': lacking}))
    with pytest.raises(ValueError, match='heads'):
        from_pretrained(tmp_path)


def test_what_a_folder_holds_is_checked(tmp_path: pathlib.Path) -> None:
    model = MODELS['simple']
    save_pretrained(tmp_path, model, variables_of(model))
    (weights,) = tmp_path.glob('model-*.safetensors')
    arrays = load_file(weights)
    bias = 'params/linear_head/bias'
    for wrong, words in (
        (arrays | {'params/colour': np.zeros(3, np.float32)}, r'params/colour: the shape is \(3,\), expected nothing'),
        ({path: array for path, array in arrays.items() if path != bias}, f'{bias}: the shape is missing'),
        (arrays | {bias: np.zeros(4, np.float32)}, rf'{bias}: the shape is \(4,\), expected \(3,\)'),
        (arrays | {bias: np.zeros(3, np.int32)}, rf'(?s)should be float64, .*; not so:.*{bias}: I32'),
    ):
        save_file(wrong, weights)
        with pytest.raises(ValueError, match=words):
            from_pretrained(tmp_path, check=False)


def test_the_weights_are_plain_safetensors(tmp_path: pathlib.Path) -> None:
    variables = variables_of(MODELS['simple'])
    save_pretrained(tmp_path, MODELS['simple'], variables)
    (weights,) = tmp_path.glob('model-*.safetensors')
    kernel = load_file(weights)['params/linear_head/kernel']
    assert np.array_equal(kernel, variables['params']['linear_head']['kernel'])
