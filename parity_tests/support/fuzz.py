"""Damaged and hostile checkpoints by the thousand: `python -m parity_tests.support.fuzz --files 20000` sums up.

Every file must give arrays that can be read to the last byte, or a ConversionError; in few steps, in little memory,
without running anything (an audit hook watches) and without writing a file. A file takes some 6 ms; with annotations
checked, as in pytest, ten times that.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import pickletools
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import joblib
import numpy as np
import safetensors.torch
import torch
from safetensors import deserialize
from vit_pytorch.simple_vit import SimpleViT

from convert import inspect
from convert.errors import ConversionError
from convert.files.checkpoint import Checkpoint, read
from convert.files.pickle_reader import Foreign
from convert.files.pickled_values import EXPANDED
from convert.files.tensors import array
from convert.files.unpacking import UNPACKED

MEMORY = 64 << 20  # what one small file may take, in bytes
# Lines of Python that it may take: up to 100 values of 7 lines each for a byte, where bytes share values (see
# `_check_size`), and up to 200 for a byte that is an instruction, most of them of checking annotations. Twice the size
# is twice the work: a square would be far beyond.
STEPS, STEPS_PER_BYTE = 2000, 900

NUMBERS = (0, 1, 2, 3, 8, 63, 64, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**64 - 1)
NAMES = (
    '..',
    '../x',
    '/etc/passwd',
    'a\0b',
    '\x1b[2J',
    '\ud800',
    '',
    'data.pkl',
    'é',
    'a' * 300,
    '__metadata__',
    'x/y',
)


class Executed:
    """As its pickle is loaded, a file would be made."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def archive(program: bytes, storages: dict[str, bytes], folder: str = 'archive', compression: int = 0) -> bytes:
    """A zip archive as torch writes it, with the given pickle and the right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive_file:
        for name, content in {'data.pkl': program, 'byteorder': b'little', 'version': b'3\n'}.items():
            archive_file.writestr(f'{folder}/{name}', content)
        for key, content in storages.items():
            archive_file.writestr(f'{folder}/data/{key}', content)
    return file.getvalue()


def safetensors_file(header: Any, content: bytes, size: int | None = None) -> bytes:
    """A safetensors file with any header, and any claim of the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if size is None else size) + text + content


def alone_in_zip(data: bytes) -> bytes:
    """A compressed zip archive with one file in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive_file:
        archive_file.writestr('packed', data)
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    'gzip': lambda data: gzip.compress(data, mtime=0),
    'bzip2': bz2.compress,
    'xz': lambda data: lzma.compress(data, preset=0),
    'zlib': zlib.compress,
    'alone in a zip': alone_in_zip,
}


@cache
def samples() -> dict[str, bytes]:
    """Sound files of each kind, to be damaged."""
    tied = torch.arange(24.0).reshape(4, 6)
    tree = {
        'state_dict': {
            'weight': tied,
            'transposed': tied.T,
            'part': tied[1:, ::2],
            'expanded': torch.ones(1).expand(3, 4),
            'half': torch.arange(7).to(torch.bfloat16),
            'eighth': torch.arange(7).to(torch.float8_e4m3fn),
            'count': torch.tensor(3),
            'none': torch.zeros(0, 5),
            'parameter': torch.nn.Parameter(torch.ones(3)),
        },
        'optimizer': {'state': {0: {'step': 1, 'average': torch.ones(2, 2)}}, 'param_groups': [{'betas': (0.9, 0.95)}]},
        'arguments': argparse.Namespace(rate=0.1),
        'epoch': 3,
    }
    arrays = {key: value.contiguous().clone() for key, value in tree['state_dict'].items()}  # type: ignore[attr-defined]
    model = SimpleViT(
        image_size=4, patch_size=4, num_classes=2, dim=8, depth=1, heads=1, mlp_dim=3, dim_head=2, channels=1
    )
    exported = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
    tree['model'] = dict(model.state_dict())
    numbers = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {}
    for name, save in {
        'torch zip archive': lambda file: torch.save(tree, file),
        'torch zip archive, protocol 4': lambda file: torch.save(tree, file, pickle_protocol=4),
        'safetensors': lambda file: file.write(safetensors.torch.save(arrays, {'format': 'pt'})),
        'torch, older': lambda file: torch.save(tree, file, _use_new_zipfile_serialization=False),
        'pickle': lambda file: pickle.dump(tree | {'numpy': numbers}, file, 2),
        'pickle, protocol 5': lambda file: pickle.dump(tree | {'numpy': numbers}, file, 5),
        'joblib': lambda file: joblib.dump({'model': numbers, 'epoch': 3}, file),
        'torch.export archive': lambda file: torch.export.save(exported, file),
        'numpy npy': lambda file: np.save(file, np.array({'model': numbers}), allow_pickle=True),
        'numpy npz': lambda file: np.savez(file, a=np.ones((3, 4)), b=np.asfortranarray(np.ones((2, 3), np.float32))),
        'numpy npz, compressed': lambda file: np.savez_compressed(file, a=np.ones((30, 4)), b=np.arange(5)),
    }.items():
        file = io.BytesIO()
        save(file)
        found[name] = file.getvalue()
    packed = pickle.dumps({'numpy': numbers}, 4)
    return found | {name: pack(packed) for name, pack in PACKERS.items()}


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four times: bits turned, bytes cut out, doubled, moved, overwritten by an extreme number, cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(found) + 1), chance.choice((1, 2, 4, 8, 30, 200))
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = found[at : at + size]
            case 3:
                source = chance.randrange(len(found) + 1)
                found[at : at + size] = found[source : source + size]
            case 4:
                number = chance.choice(NUMBERS).to_bytes(8, 'little')[: chance.choice((1, 2, 4, 8))]
                found[at : at + len(number)] = number
            case 5 if chance.random() < 0.3:
                del found[at:]
    return bytes(found)


def damaged_program(program: bytes, chance: random.Random) -> bytes:
    """Instructions of a pickle removed, doubled, exchanged, given other arguments, or joined by hostile ones."""
    places = [place or 0 for _, _, place in pickletools.genops(program)]
    steps = [program[start:stop] for start, stop in zip(places, [*places[1:], len(program)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, other = chance.randrange(len(steps)), chance.randrange(len(steps))
        match chance.randrange(6):
            case 0 if len(steps) > 1:
                del steps[at]
            case 1:
                steps.insert(other, steps[at])
            case 2:
                steps[at], steps[other] = steps[other], steps[at]
            case 3:
                steps[at] = chance.choice(HOSTILE)
            case 4:
                steps.insert(at, chance.choice(HOSTILE))
            case 5:
                number = chance.choice(NUMBERS)
                steps[at] = chance.choice((pickle.dumps(number, 2)[2:-1], pickle.dumps(-number, 2)[2:-1]))
    return b''.join(steps)


# Single instructions and short programs; each may be legal where it lands.
HOSTILE = (
    *(bytes([code]) for code in b'(.0123}])tlduseabRQNQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98'),
    *(b'r\xff\xff\xff\xff', b'j\xff\xff\xff\xff', b'q\0', b'h\0', b'h\1', b'p9999999999\n', b'g0\n', b'P0\n'),
    *(struct.pack('<cQ', code, 2**60) for code in (b'\x8d', b'\x8e', b'\x96', b'\x95')),  # claims of an exabyte
    *(struct.pack('<cL', code, 2**31 - 1) for code in (b'X', b'B', b'T', b'\x8b')),
    *(
        b'cos\nsystem\n',
        b'cbuiltins\nexec\nX\x04\0\0\0exit\x85R',
        b'ios\nsystem\n',
        b'\x82\1',
        b'\x83\1\1',
        b'cx\xff\n\n',
    ),
    *(
        b'ctorch._utils\n_rebuild_tensor_v2\n',
        b'ctorch\nFloatStorage\n',
        b'ccollections\nOrderedDict\n)R',
        b']2a',
        b'}2K\1s',
    ),
    *(b'G' + struct.pack('>d', number) for number in (float('nan'), float('inf'), 1e308)),
    *(
        b'X' + struct.pack('<L', len(name.encode('utf-8', 'surrogatepass'))) + name.encode('utf-8', 'surrogatepass')
        for name in NAMES
    ),
    *(b']' + b'2\x86' * 60, b']' + b'\x85' * 500, b'\x8a\xff' + b'\x7f' * 255),
)


def damaged_header(data: bytes, chance: random.Random) -> bytes:
    """The JSON of a safetensors file with other names, numbers, kinds and claims, and its length mended."""
    (size,) = struct.unpack_from('<Q', data)
    header, content = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(list(header))
        entry = header[name]
        number: Any = chance.choice((*NUMBERS, -1, -(2**63), 1.5, True, None, '1', [], 10**400, {}))
        match chance.randrange(6):
            case 0:
                header[chance.choice(NAMES)] = header.pop(name)
            case 1 if 'shape' in entry:
                entry[chance.choice(('shape', 'data_offsets'))] = [number, chance.choice(NUMBERS)]
            case 2 if isinstance(entry.get('shape'), list):
                entry['shape'].insert(0, number)
            case 3:
                entry['dtype'] = chance.choice(('F4', 'F6_E2M3', 'I64', 'U8', 'BF16', 'C64', 'nan', number))
            case 4:
                header[name] = number
            case 5:
                header[name] = dict(header[chance.choice(list(header))] or {}) if isinstance(entry, dict) else entry
        header = {key: value if isinstance(value, dict) else {'was': value} for key, value in header.items()}
    text = json.dumps(header).encode()
    if chance.random() < 0.2:
        text = text.replace(b'{', b'{"weight": {}, ', 1)
    claim = chance.choice(NUMBERS) if chance.random() < 0.1 else None
    return safetensors_file(text, content[: chance.choice((len(content), len(content), len(content) // 2))], claim)


def damaged_files(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` pairs of a kind and a damaged file, the same for the same seed, but for addresses in older formats."""
    sound = samples()
    archives = {}
    for name in ('torch zip archive', 'torch zip archive, protocol 4'):
        with zipfile.ZipFile(io.BytesIO(sound[name])) as file:
            content = {path.split('/', 1)[1]: file.read(path) for path in file.namelist()}
        storages = {path.removeprefix('data/'): data for path, data in content.items() if path.startswith('data/')}
        archives[name] = content['data.pkl'], storages
    for number in range(count):
        chance = random.Random(f'{seed}, {number}')  # its own, so that nothing hangs on the files before
        kind = chance.choice(list(sound))
        draw = chance.random()
        if kind in archives and draw < 0.6:
            program, storages = archives[kind]
            yield f'{kind}: instructions', archive(damaged_program(program, chance), storages)
        elif kind == 'safetensors' and draw < 0.6:
            yield f'{kind}: header', damaged_header(sound[kind], chance)
        elif kind.startswith('pickle') and draw < 0.5:
            yield f'{kind}: instructions', damaged_program(sound[kind], chance)
        elif kind in PACKERS and draw < 0.6:
            yield f'{kind}: damaged before', PACKERS[kind](damaged_bytes(sound[chance.choice(list(sound))], chance))
        elif draw < 0.7:
            other, cut = sound[chance.choice(list(sound))], chance.random()
            yield f'{kind}: spliced', sound[kind][: int(cut * len(sound[kind]))] + other[int(cut * len(other)) :]
        elif draw < 0.8:
            yield f'{kind}: cut off', sound[kind][: chance.randrange(len(sound[kind]))]
        else:
            yield f'{kind}: bytes', damaged_bytes(sound[kind], chance)


class Watch:
    """While on, notes every event by which a file could do something: code run, a module found, a file written, ..."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        for codec in ('cp437', 'raw_unicode_escape'):  # what zip files and pickles name beside UTF-8 is found before
            ''.encode(codec)
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.startswith(
            ('exec', 'compile', 'import', 'pickle.', 'os.', 'subprocess.', 'socket.', 'ctypes.', 'shutil.')
        ):
            self.seen.append(f'{event} {arguments!r:.200}')


_watch: Watch | None = None


def arrays_of(value: Any) -> Iterator[np.ndarray]:
    """Every array of a tree."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from arrays_of(part)


def steps(function: Callable[[], Any]) -> int:
    """The lines of Python that a call runs: its work, the same on every machine and under any load."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == 'line'
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def attempt(path: Path, compare: bool = True) -> tuple[str, int, int]:
    """Reads a damaged file -> ('converted' or 'refused', steps, peak of memory in bytes).

    Raises: AssertionError if the file did anything, if an array is wrong, if a message would upset a terminal; if it
    took more steps than its size explains, or too much memory; and whatever else than ConversionError `read` and
    `inspect` raise.
    """
    global _watch
    if _watch is None:
        # The layouts' names are traced once, for each thing that names and shapes may tell of the parameters.
        for telling in itertools.product(('', 'transformer.layers.0.0.to_out.0.weight'), ('', 'cls_token'), (0, 1)):
            *names, size = telling
            with contextlib.suppress(ConversionError):
                inspect({name: np.zeros((size, 1)) for name in ('transformer.norm.weight', *filter(None, names))})
        _watch = Watch()
    checkpoint, messages = None, []

    def inspected() -> None:
        try:
            inspect(path)
        except ConversionError as error:
            messages.append(str(error))

    _watch.seen.clear()
    _watch.on = True
    try:
        with contextlib.suppress(ConversionError):
            checkpoint = read(path)
        work = steps(inspected)
    finally:
        _watch.on = False
    assert work < STEPS + STEPS_PER_BYTE * path.stat().st_size, f'{work} steps for {path.stat().st_size} bytes'
    tracemalloc.start()  # once more, since the count takes memory itself
    try:
        inspected()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f'{peak} bytes of memory'
    assert not _watch.seen, _watch.seen
    for message in messages:
        assert message.replace('\n', '').isprintable(), repr(message)
        assert len(message) < 10_000
    if checkpoint is None:
        return 'refused', work, peak
    for found in arrays_of(checkpoint.tree):
        assert not found.flags.writeable
        packed = 'npz' in checkpoint.format or 'compressed' in checkpoint.format
        assert found.nbytes <= (UNPACKED if packed else max(path.stat().st_size, EXPANDED))
        found.tobytes()  # every byte is there: outside the file this would be a crash
    if compare:  # not for files that torch itself would never be done with
        check_with_library(path, checkpoint)
    return 'converted', work, peak


def check_with_library(path: Path, checkpoint: Checkpoint) -> None:
    """What we read from safetensors their library reads, the same bytes; what torch reads too is the same in both."""
    if checkpoint.format == 'safetensors':
        theirs = {name: (tuple(found['shape']), bytes(found['data'])) for name, found in deserialize(path.read_bytes())}
        assert theirs == {name: (ours.shape, ours.tobytes()) for name, ours in checkpoint.tree.items()}
    if checkpoint.format in ('torch zip archive', "torch's older format"):
        try:
            with warnings.catch_warnings(action='ignore'), torch.serialization.safe_globals([argparse.Namespace]):
                tree = torch.load(path, map_location='cpu', weights_only=True)
        except Exception:  # torch knows fewer classes, and refuses other damage
            return
        check_same(tree, checkpoint.tree)


def check_same(theirs: Any, ours: Any) -> None:
    """Torch's tree and ours hold the same arrays, bit for bit, in the same places."""
    if isinstance(ours, np.ndarray):
        expected = array(theirs)
        assert (expected.shape, expected.dtype, expected.tobytes()) == (ours.shape, ours.dtype, ours.tobytes())
    elif isinstance(ours, dict):
        theirs = vars(theirs) if isinstance(theirs, argparse.Namespace) else theirs
        for key in ours:
            if not isinstance(key, Foreign):
                check_same(theirs[key], ours[key])
    elif isinstance(ours, list | tuple):
        for their_part, our_part in zip(theirs, ours, strict=True):
            check_same(their_part, our_part)


def main() -> None:
    """Reads many damaged files, and prints how many were refused, the longest way and the most memory.

    A file that fails is kept, and named in the error. Ctrl+C, or SIGTERM, ends the run early.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--files', type=int, default=20_000)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()
    longest, hungriest, slowest = (0, ''), (0, ''), (0.0, '')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path = Path(tempfile.mkdtemp()) / 'damaged'
    with contextlib.suppress(KeyboardInterrupt):
        for number, (kind, data) in enumerate(damaged_files(arguments.seed, arguments.files)):
            name = f'{kind}, number {number}'
            path.write_bytes(data)
            start = time.process_time()
            try:
                outcome, work, peak = attempt(path)
            except Exception as error:
                error.add_note(f'{name} of seed {arguments.seed}, kept as {path}')
                raise
            if number:  # the first finds much to import
                slowest = max(slowest, (time.process_time() - start, name))
            longest, hungriest = max(longest, (work, name)), max(hungriest, (peak, name))
            outcomes[kind, outcome] += 1
            if outcomes.total() % 1000 == 0:
                print(f'{outcomes.total()} files', flush=True)
    path.unlink(missing_ok=True)
    path.parent.rmdir()  # nothing else was written there
    for kind in sorted({kind for kind, _ in outcomes}):
        print(f'{kind:45} {outcomes[kind, "refused"]:7} refused {outcomes[kind, "converted"]:7} converted')
    total = Counter(outcome for _, outcome in outcomes.elements())
    print(
        f'{outcomes.total()} files, {total["refused"]} refused, {total["converted"]} converted; none did anything else'
    )
    print(f'most steps {longest[0]} ({longest[1]}); most memory {hungriest[0] >> 10} KiB ({hungriest[1]})')
    print(f'most seconds, with all the measuring: {slowest[0]:.2f} ({slowest[1]})')


if __name__ == '__main__':
    main()
