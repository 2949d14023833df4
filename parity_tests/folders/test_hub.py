"""Models on the Hugging Face Hub: published and read through its own library, from a server on this machine."""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from flax_vit import from_pretrained, push_to_hub, save_pretrained
from flax_vit.folders.config import read_config
from parity_tests.support.hub_server import check_beginnings, client, serving
from parity_tests.support.pages import ROOT, blocks
from parity_tests.support.small_models import MODELS, variables_of

CLIENT = """
import hashlib
import jax
import numpy as np
import flax_vit

def total(name, **more):
    model, variables = flax_vit.from_pretrained(name, **more)
    return type(model).__name__, float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(variables)))

def error(name, **more):
    try:
        flax_vit.from_pretrained(name, **more)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
"""
ONLINE = """
first = flax_vit.push_to_hub('old', 'vit').split('/')[-1]
flax_vit.push_to_hub('new', 'someone/vit', commit_message='better')
print(total('someone/vit'))
print(total('someone/vit', revision=first))
print(total('someone/vit', cache_dir='elsewhere'))
print(first)
print(error('someone/else'))
print(error('someone/vit', revision='v9'))
print(error('someone/vit', revision=hashlib.sha1(b'someone/vit').hexdigest()))  # before anything was published
print(error('google/vit'))
"""


def total(model: Any, variables: Any) -> str:
    return str(
        (type(model).__name__, float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(variables))))
    )


def test_published_and_read(tmp_path: pathlib.Path) -> None:
    old, new = (MODELS[name] for name in ('simple', 'deep'))
    save_pretrained(tmp_path / 'old', old, variables_of(old), max_shard_size=9000)
    save_pretrained(tmp_path / 'new', new, variables_of(new), source={'from': 'training'}, max_shard_size=9000)
    with serving() as (address, hub):
        foreign = {'config.json': b'{"model_type": "vit"}', 'model-00001-of-00002.safetensors': b'...'}
        hub.commits['google/vit'] = [('0' * 40, foreign)]
        now, before, elsewhere, first, *errors = client(CLIENT + ONLINE, tmp_path, HF_ENDPOINT=address)
    assert now == elsewhere == total(*from_pretrained(tmp_path / 'new'))
    assert before == total(*from_pretrained(tmp_path / 'old'))
    expected = (
        'FileNotFoundError: someone/else is not here, and the Hugging Face Hub did not give it: Repository',
        'FileNotFoundError: someone/vit is not here, and the Hugging Face Hub did not give it at the revision v9',
        'FileNotFoundError: someone/vit is not here',
        'ValueError: ',
    )
    check_beginnings(errors, expected)
    assert 'config.json is not the configuration of a model' in errors[-1]

    (_, nothing), (oid, published), (_, latest) = hub.commits['someone/vit']
    assert (nothing, oid) == ({}, first)
    assert b'| `dim` | `16` |' in published['README.md']  # made of the configuration: `old` has no card
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / 'new').iterdir()}
    on_disk['README.md'] = on_disk['README.md'].replace(b"'this/folder'", b"'someone/vit'")
    assert latest == on_disk  # the weights of the first are gone
    assert len(read_config(tmp_path / 'new')['weights']) > 1
    assert 'model-00001-of-00002.safetensors' not in hub.downloads
    assert hub.downloads.count('README.md') == 1  # by the second push, to see whether somebody has edited it

    script = "print(total('someone/vit'), error('someone/else'), sep='\\n')"
    again, missing = client(
        CLIENT + script, tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE='1'
    )  # and nobody serves any more
    assert again == now
    assert 'someone/else is neither a local folder nor in the cache' in missing
    assert 'unset HF_HUB_OFFLINE' in missing


ONTO_OTHERS = """
import pathlib

def push(name):
    try:
        return flax_vit.push_to_hub('new', name)
    except ValueError as error:
        return f'ValueError: {error}'

print(push('google/vit'))
print(push('someone/notes'))
print(push('someone/edited'))
for text in ('first', 'second'):
    pathlib.Path('new/README.md').write_text(text)
    push('someone/edited')
"""


def test_what_others_have_published_or_edited_is_kept(tmp_path: pathlib.Path) -> None:
    save_pretrained(tmp_path / 'old', MODELS['simple'], variables_of(MODELS['simple']), source={'from': 'training'})
    save_pretrained(tmp_path / 'new', MODELS['deep'], variables_of(MODELS['deep']), source={'from': 'training'})
    foreign = {'config.json': b'{"model_type": "vit"}', 'model-00001-of-00002.safetensors': b'...'}
    old = {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()}
    with serving() as (address, hub):
        for name, files in (
            ('google/vit', foreign),
            ('someone/notes', {'README.md': b'mine', 'model-00001-of-00002.safetensors': b'...'}),
            ('someone/edited', old | {'README.md': old['README.md'] + b'mine'}),
        ):
            hub.commits[name] = [('0' * 40, files)]
        refused, *_ = client(CLIENT + ONTO_OTHERS, tmp_path, HF_ENDPOINT=address)
    assert refused.startswith('ValueError: google/vit on the Hugging Face Hub is left as it is; give another name: ')
    assert 'config.json is not the configuration of a model' in refused
    assert [files for _, files in hub.commits['google/vit']] == [foreign]
    new = {path.name: path.read_bytes() for path in (tmp_path / 'new').iterdir()}
    pages = [files['README.md'] for _, files in hub.commits['someone/edited']]
    assert pages[1:] == [old['README.md'] + b'mine', b'first', b'second']  # the folder's own page, once it is edited
    assert hub.commits['someone/edited'][-1][1] == new
    notes = hub.commits['someone/notes'][-1][1]
    assert notes == new | {'README.md': b'mine', 'model-00001-of-00002.safetensors': b'...'}


def test_a_damaged_folder_is_not_published(tmp_path: pathlib.Path) -> None:
    save_pretrained(tmp_path, MODELS['simple'], variables_of(MODELS['simple']))
    config = json.loads((tmp_path / 'config.json').read_text())
    config['weights'][0]['sha256'] = '0' * 64
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='is damaged'):
        push_to_hub(tmp_path, 'someone/vit')


def test_what_is_neither_a_folder_nor_a_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    for name in ('vit', '/no/such/vit', 'a/b/c', '../vit', './vit', 'vit/'):
        with pytest.raises(FileNotFoundError, match='neither a folder here nor a name on the Hugging Face Hub'):
            from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r'config\.json does not exist'):
        from_pretrained(pathlib.Path('someone/vit'))  # a path is a path
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match=r"pip install 'flax-vit\[hub\]'"):
        from_pretrained('someone/vit')
    monkeypatch.chdir(tmp_path)
    save_pretrained('someone/vit', MODELS['simple'], variables_of(MODELS['simple']))
    from_pretrained('someone/vit')  # a folder comes first
    for folder in ('someone/vit', pathlib.Path('someone/vit')):
        with pytest.raises(ValueError, match='someone/vit is taken for a folder here, which has no revision main'):
            from_pretrained(folder, revision='main')


def test_the_page(tmp_path: pathlib.Path) -> None:
    (block,) = (text for _, text in blocks(ROOT / 'docs' / 'folders.md', 'python') if 'push_to_hub' in text)
    model = MODELS['deep']
    save_pretrained(tmp_path / 'deep-vit', model, variables_of(model))
    with serving() as (address, hub):
        client(CLIENT + block, tmp_path, HF_ENDPOINT=address)
        assert list(hub.commits) == ['owner/deep-vit']
