"""Sources that are no paths: addresses, repositories of the hub, standard input. Servers run on this machine."""

import base64
import hashlib
import io
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import safetensors.numpy

from convert.errors import ConversionError
from convert.files import remote
from convert.files.checkpoint import read
from parity_tests.support.hub_server import check_beginnings, client, serving

WEIGHTS = np.arange(300_000, dtype=np.float32)  # more than one chunk of a socket
CONTENT = safetensors.numpy.save({'weight': WEIGHTS})


class Server(BaseHTTPRequestHandler):
    """What a path's first part says is what goes wrong with it."""

    content: ClassVar[bytes] = CONTENT
    asked: ClassVar[Counter[str]] = Counter()
    goes_on: ClassVar[threading.Event] = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        what = self.path.split('/')[1]
        self.asked[f'{self.command} {what}'] += 1
        if what in ('401', '404', '500') or (what == 'no-head' and self.command == 'HEAD'):
            self.send_error(int(what) if what.isdigit() else 405)
            return
        if what == 'moved':
            self.send_response(302)
            self.send_header('Location', '/whole/moved.safetensors')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(200)
        if what != 'no-head':
            self.send_header('Content-Length', str(len(self.content)))
        self.send_header('ETag', hashlib.md5(self.content).hexdigest())
        if what in ('hashed', 'damaged'):
            right = self.content if what == 'hashed' else b'other'
            self.send_header('Content-MD5', base64.b64encode(hashlib.md5(right).digest()).decode())
        self.end_headers()
        if self.command == 'HEAD':
            return
        half = len(self.content) // 2
        self.wfile.write(self.content[:half])
        if what == 'stalled':
            self.goes_on.wait(60)
        if what not in ('cut', 'stalled'):
            self.wfile.write(self.content[half:])

    def log_message(self, *_: Any) -> None:
        """Tests are silent."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address; downloads are kept in a folder of the test's own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(Server, 'content', CONTENT)
    monkeypatch.setattr(Server, 'asked', Counter())
    monkeypatch.setattr(Server, 'goes_on', threading.Event())
    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    Server.goes_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / 'flax-vit-downloads').rglob('*') if path.is_file())


@pytest.mark.parametrize('what', ['whole', 'moved', 'hashed', 'no-head'])
def test_a_file_at_an_address(what: str, server: str, tmp_path: Path) -> None:
    address = f'{server}/{what}/my%20weights.safetensors?download=true'
    for _ in range(2):
        found = read(address)
        np.testing.assert_array_equal(found.tree['weight'], WEIGHTS)
        assert found.files[0].name == 'my weights.safetensors'
    assert kept(tmp_path) == ['my weights.safetensors']
    fetched = {'moved': 'whole'}.get(what, what)
    assert Server.asked[f'GET {fetched}'] == {'no-head': 3}.get(what, 1)  # it tells its headers by GET alone


def test_another_file_at_the_same_address(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(f'{server}/whole/a.safetensors')
    monkeypatch.setattr(Server, 'content', safetensors.numpy.save({'weight': WEIGHTS + 1}))
    assert read(f'{server}/whole/a.safetensors').tree['weight'][0] == 1


@pytest.mark.parametrize(
    ('what', 'words'),
    [('cut', 'Not enough data'), ('damaged', 'MD5 differs'), ('stalled', 'Timeout'), ('401', '401'), ('500', '500')],
)
def test_what_does_not_arrive(
    what: str, words: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, '_SECONDS', 1)
    fsspec.filesystem('http').clear_instance_cache()  # the connection of the test before is patient
    with pytest.raises(OSError, match='cannot be fetched') as caught:
        read(f'{server}/{what}/vit.pt')
    assert words in str(caught.value)
    assert not kept(tmp_path)


def test_a_large_file_may_take_hours() -> None:
    patience = remote._patience()['client_kwargs']['timeout']
    assert (patience.total, patience.sock_read) == (None, 60)


def test_a_bar_where_somebody_looks(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, 'stderr', stream)
        read(f'{server}/whole/{type(stream).__name__}.safetensors')
        assert ('Terminal.safetensors: 100%' in stream.getvalue()) == stream.isatty()
    assert not stream.getvalue()


def test_what_is_not_there(server: str) -> None:
    with pytest.raises(FileNotFoundError, match='there is no such file'):
        read(f'{server}/404/vit.pt')
    with pytest.raises(OSError, match='cannot be fetched: ClientConnector'):
        read('http://127.0.0.1:9/vit.pt')  # nobody is at this port
    with pytest.raises(FileNotFoundError):
        read('memory://nothing/vit.pt')


def test_whatever_fsspec_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with fsspec.open('memory://bucket/vit.safetensors', 'wb') as file:
        file.write(CONTENT)
    np.testing.assert_array_equal(read('memory://bucket/vit.safetensors').tree['weight'], WEIGHTS)
    assert kept(tmp_path) == ['vit.safetensors']


@pytest.mark.parametrize(
    ('source', 'module', 'advice'),
    [
        ('https://example.com/vit.pt', 'aiohttp', r"pip install 'flax-vit\[remote\]'"),
        ('s3://bucket/vit.pt', 's3fs', 's3fs'),
        ('strange://bucket/vit.pt', 'no_such_module', 'download it, and give its path'),
        ('https://example.com/vit.pt', 'tqdm', r"pip install 'flax-vit\[remote\]'"),
        ('https://example.com/vit.pt', 'fsspec', r"pip install 'flax-vit\[remote\]'"),
        ('hf://owner/vit', 'huggingface_hub', r"pip install 'flax-vit\[hub\]'"),
    ],
)
def test_a_library_is_missing(source: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConversionError, match=advice):
        read(source)


def test_no_place_to_keep_it(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').touch()
    with monkeypatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
        np.testing.assert_array_equal(read(f'{server}/whole/vit.safetensors').tree['weight'], WEIGHTS)
    monkeypatch.setattr(os, 'access', lambda *_: False)  # as where a folder is for reading alone
    np.testing.assert_array_equal(read(f'{server}/whole/b.safetensors').tree['weight'], WEIGHTS)
    assert not kept(tmp_path)


def test_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, also one of a name that an address could have; a file that is not there is not looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for folder in ('owner/vit', 'http:/host'):
        Path(folder).mkdir(parents=True)
        (Path(folder) / 'vit.safetensors').write_bytes(CONTENT)
    for source in ('owner/vit', 'http://host', '~/owner/vit', '~/owner/vit/vit.safetensors'):
        np.testing.assert_array_equal(read(source).tree['weight'], WEIGHTS)
    for source in ('runs/vit.pt', 'owner/nothing', 'nothing', 'a/b/c', '~nobody-of-this-name/vit.pt'):
        with pytest.raises(FileNotFoundError, match='No such file'):
            read(source)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes once, and may be read again: to verify what was converted."""
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(CONTENT)))
    remote._standard_input.cache_clear()
    for _ in range(2):
        np.testing.assert_array_equal(read('-').tree['weight'], WEIGHTS)
    remote._standard_input.cache_clear()


ON_THE_HUB = """
import json, sys
from convert.files.checkpoint import read

for source in json.loads(sys.argv[1]):
    try:
        found = read(source)
        print(json.dumps([sorted(found.tree), [file.name for file in found.files]]))
    except Exception as error:
        print(json.dumps(f'{type(error).__name__}: {error}'))
"""


def on_the_hub(sources: list[str], folder: Path, **environment: str) -> list[Any]:
    """What reading each gives: names of tensors and files, or the error."""
    lines = client(ON_THE_HUB, folder, json.dumps(sources), HF_HUB_ETAG_TIMEOUT='1', **environment)
    return [json.loads(line) for line in lines]


def test_repositories_of_the_hub(tmp_path: Path) -> None:
    def tensors(*names: str) -> bytes:
        return safetensors.numpy.save(dict.fromkeys(names, WEIGHTS[:4]))

    shards = {f'model-0000{number}-of-00002.safetensors': tensors(f'part{number}') for number in (1, 2)}
    index = json.dumps({'weight_map': {f'part{number}': name for number, name in enumerate(shards, 1)}}).encode()
    escaping = json.dumps({'weight_map': {'a': '../../a.safetensors'}}).encode()
    repositories = {
        'owner/one': {'model.safetensors': tensors('one'), 'config.json': b'{"heads": 2}', 'optimizer.pt': b'...'},
        'owner/shards': {'model.safetensors.index.json': index, **shards},
        'owner/two': {'a.safetensors': tensors('a'), 'b.bin': b'...', 'step/c.safetensors': tensors('c')},
        'owner/none': {'README.md': b'...'},
        'owner/escaping': {'model.safetensors.index.json': escaping},
    }
    old, new = '0' * 40, '1' * 40
    with serving() as (address, hub):
        for name, files in repositories.items():
            hub.commits[name] = [(old, {'old.safetensors': tensors('old')}), (new, files)]
        one, also_one, old_one, shards_read, a, c, *errors = on_the_hub(
            [
                'owner/one',
                'hf://owner/one',
                f'hf://owner/one@{old}',
                'owner/shards',
                'hf://owner/two/a.safetensors',
                'hf://owner/two/step',
                'owner/two',
                'owner/none',
                'hf://owner/nothing',
                'hf://owner/one/no.pt',
                'hf://owner/one@v9',
                'hf://owner',
                'owner/escaping',
            ],
            tmp_path,
            HF_ENDPOINT=address,
        )
    assert one == also_one == [['one'], ['model.safetensors']]
    assert old_one == [['old'], ['old.safetensors']]
    assert shards_read == [['part1', 'part2'], ['model.safetensors.index.json', *sorted(shards)]]
    assert (a[0], c[0]) == (['a'], ['c'])
    assert Counter(hub.downloads) == Counter(  # each once, and what is beside the weights
        ['model.safetensors', 'config.json', 'old.safetensors', *shards, 'a.safetensors', 'step/c.safetensors']
        + ['model.safetensors.index.json'] * 2
    )
    expected = (
        'ConversionError: owner/two holds 2 checkpoints; give the one to convert:\n'
        '  hf://owner/two/a.safetensors\n  hf://owner/two/b.bin',
        'ConversionError: owner/none holds no checkpoint: README.md',
        'FileNotFoundError: hf://owner/nothing is not here, and the Hugging Face Hub did not give it: Repository',
        'FileNotFoundError: hf://owner/one/no.pt is not here, and the Hugging Face Hub did not give it: ',
        'FileNotFoundError: hf://owner/one@v9 is not here, and the Hugging Face Hub did not give it at the',
        'ConversionError: hf://owner is no address on the Hugging Face Hub',
        'ConversionError: ',
    )
    check_beginnings(errors, expected)
    assert 'is not the plain name of a file beside it' in errors[-1]

    class Moving(list[str]):
        """Somebody pushes as soon as the index is fetched."""

        def append(self, name: str) -> None:
            super().append(name)
            hub.commits['owner/shards'].append(('2' * 40, dict.fromkeys((*shards, 'config.json'), b'')))

    with serving() as (address, hub):
        hub.commits['owner/shards'] = [(new, repositories['owner/shards'])]
        hub.downloads = Moving()
        (tmp_path / 'moving').mkdir()
        assert on_the_hub(['owner/shards'], tmp_path / 'moving', HF_ENDPOINT=address) == [shards_read]

    sources = ['hf://owner/one/model.safetensors', 'owner/one', 'hf://owner/else/model.safetensors']
    again, unlisted, missing = on_the_hub(sources, tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE='1')
    assert again == one
    assert unlisted.startswith('FileNotFoundError: owner/one is neither a local folder nor in the cache')
    assert 'unset HF_HUB_OFFLINE' in missing
    (unreachable,) = on_the_hub(['owner/one'], tmp_path, HF_ENDPOINT='http://127.0.0.1:9')
    assert unreachable.startswith('OSError: owner/one: the Hugging Face Hub cannot be read: Connect'), unreachable


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('owner/vit', ('owner/vit', None, None)),
        ('owner/vit@v1/a/b.pt', ('owner/vit', 'v1', 'a/b.pt')),
        ('owner/vit@refs/pr/1/b.pt', ('owner/vit', 'refs/pr/1', 'b.pt')),
        ('owner/vit@refs/convert/safetensors', ('owner/vit', 'refs/convert/safetensors', None)),
    ],
)
def test_addresses_on_the_hub(name: str, parts: tuple[str | None, ...]) -> None:
    found = remote._ON_THE_HUB.fullmatch(name)
    assert found is not None
    assert (found['repository'], found['revision'], found['path']) == parts
