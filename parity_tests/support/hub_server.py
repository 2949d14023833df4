"""As much of the Hugging Face Hub as models need: repositories in memory, served over HTTP on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

Files = dict[str, bytes]


class Hub(BaseHTTPRequestHandler):
    """Each repository is its commits, oldest first: (hash, files by path).

    All files are taken as parts of a commit; how the real hub takes big ones is the library's affair.
    """

    protocol_version = 'HTTP/1.1'
    commits: ClassVar[dict[str, list[tuple[str, Files]]]] = defaultdict(list)
    downloads: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers['Content-Length']))
        if self.path == '/api/repos/create':
            wanted = json.loads(body)
            name = f'{wanted.get("organization") or "someone"}/{wanted["name"]}'
            if not self.commits[name]:
                self.commits[name].append((digest(name.encode()), {}))
            self.answer({'url': f'{self.address}/{name}'})
        elif self.path == '/api/validate-yaml':  # the header of README.md
            self.answer({'errors': [], 'warnings': []})
        elif '/preupload/' in self.path:
            paths = [file['path'] for file in json.loads(body)['files']]
            self.answer({'files': [{'path': path, 'uploadMode': 'regular', 'shouldIgnore': False} for path in paths]})
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', self.path):
            commit = self.commit(match[1], [json.loads(line) for line in body.splitlines()])
            self.answer({'commitUrl': f'{self.address}/{match[1]}/commit/{commit}', 'commitOid': commit})
        else:
            self.answer({'error': 'not found'}, 404)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.commits[name][-1][1])
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'deletedFile':
                del files[value['path']]
        commit = digest(json.dumps([self.commits[name][-1][0], sorted(files)]).encode())
        self.commits[name].append((commit, files))
        return commit

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split('?')[0]
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)', path)
        match = match or re.fullmatch(r'/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)', path)
        history = self.commits.get(match[1]) if match else None
        if not match or not history:
            self.answer({'error': 'not found'}, 404, {'X-Error-Code': 'RepoNotFound'})
            return
        found = [history[-1]] if match[3] == 'main' else [commit for commit in history if commit[0] == match[3]]
        if not found:
            self.answer({'error': 'Revision not found'}, 404, {'X-Error-Code': 'RevisionNotFound'})
            return
        commit, files = found[0]
        if match[2] == 'revision':
            self.answer({'id': match[1], 'sha': commit, 'siblings': [{'rfilename': path} for path in files]})
        elif match[2] == 'tree':
            self.answer([tree_entry(path, data) for path, data in files.items()])
        elif match[4] not in files:
            self.answer({'error': 'Entry not found'}, 404, {'X-Error-Code': 'EntryNotFound'})
        else:
            data = files[match[4]]
            if self.command == 'GET':
                self.downloads.append(match[4])
            headers = {'ETag': f'"{tree_entry(match[4], data)["oid"]}"', 'X-Repo-Commit': commit}
            self.answer(data, 200, headers)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Tests are silent."""

    @property
    def address(self) -> str:
        return f'http://{self.headers["Host"]}'


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it: big ones also by their sha256."""
    entry = {'type': 'file', 'path': path, 'size': len(data), 'oid': digest(b'blob %d\0' % len(data) + data)}
    if path.endswith('.safetensors'):
        sha256 = hashlib.sha256(data).hexdigest()
        entry['oid'] = sha256
        entry['lfs'] = {'oid': sha256, 'size': len(data), 'pointerSize': 130}
    return entry


def digest(data: bytes) -> str:
    """As git names things."""
    return hashlib.sha1(data).hexdigest()


def client(script: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What `script` prints, in a process of its own: the hub's library reads the environment when it is imported."""
    environment |= {'HF_HOME': str(folder / 'home'), 'HF_TOKEN': 'hf_x', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
    ended = subprocess.run(
        [sys.executable, '-c', script, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def check_beginnings(errors: Sequence[str], expected: Sequence[str]) -> None:
    """Each error begins as expected."""
    for error, words in zip(errors, expected, strict=True):
        assert error.startswith(words), error


@contextmanager
def serving() -> Iterator[tuple[str, type[Hub]]]:
    """An empty hub: its address, and what it holds."""
    hub = type('FreshHub', (Hub,), {'commits': defaultdict(list), 'downloads': []})
    server = ThreadingHTTPServer(('127.0.0.1', 0), hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
