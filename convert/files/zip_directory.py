"""A zip archive's directory, every place it names checked against the file. Nothing is unpacked here."""

import reprlib
import struct
from itertools import pairwise
from mmap import mmap
from typing import NamedTuple

from convert.errors import ConversionError

RECORDS = 200_000  # the most files in an archive

_quote = reprlib.Repr()
_quote.maxstring = _quote.maxother = 200
_quote.maxlevel = 2
quote = _quote.repr  # how a message shows what a file holds: control characters escaped, and short


class Record(NamedTuple):
    """Where one file of a zip archive lies: `stored` bytes from `start`, which unpack to `size` bytes."""

    start: int
    stored: int
    size: int
    deflated: bool
    checksum: int


def zip_records(data: mmap | bytes) -> dict[str, Record]:
    """Every file of a zip archive by name: none outside it, overlapping, there twice or encrypted.

    Raises: ConversionError, struct.error, UnicodeDecodeError.
    """
    end = data.rfind(b'PK\5\6', max(0, len(data) - 22 - 0xFFFF))  # a comment of up to 64 KiB may follow
    if end < 0:
        raise ConversionError('a zip archive without its directory, cut off? Copy or download it again')
    count, size, offset = struct.unpack_from('<10xHLL', data, end)
    if count == 0xFFFF or 0xFFFFFFFF in (size, offset):
        end = struct.unpack_from('<8xQ', data, _inside(end - 20, 20, end))[0]
        count, size, offset = struct.unpack_from('<32xQQQ', data, _inside(end, 56, len(data)))
    at = _inside(offset, size, end)
    if count > min(RECORDS, size // 46):
        raise ConversionError(f'a zip archive that claims {count} files in a directory of {size} bytes')
    records: dict[str, Record] = {}
    spans = [(offset, len(data))]
    for _ in range(count):
        signature, flags, method, checksum, *numbers = struct.unpack_from(
            '<L4xHH4xLLLHHH8xL', data, _inside(at, 46, end)
        )
        stored, size, name_size, extra_size, comment_size, start = numbers
        name = data[at + 46 : at + 46 + name_size]
        extra = data[at + 46 + name_size : at + 46 + name_size + extra_size]
        at += 46 + name_size + extra_size + comment_size
        stored, size, start = _zip64(extra, stored, size, start)
        local, local_name_size, local_extra_size = struct.unpack_from('<L22xHH', data, _inside(start, 30, end))
        body = start + 30 + local_name_size + local_extra_size
        known = (signature, local) == (0x02014B50, 0x04034B50) and name == data[start + 30 : body - local_extra_size]
        text = name.decode('utf-8' if flags & 0x800 else 'cp437')
        if not known or flags & 1 or method not in (0, 8) or (method == 0 and stored != size) or text in records:
            raise ConversionError(f'a zip archive in which {quote(text)} is damaged, encrypted or there twice')
        spans.append((start, body + stored))
        records[text] = Record(body, stored, size, method == 8, checksum)
    spans.sort()
    if any(stop > start for (_, stop), (start, _) in pairwise(spans)):
        raise ConversionError('a zip archive whose files overlap')
    return records


def _inside(start: int, size: int, end: int) -> int:
    if not 0 <= start <= start + size <= end:
        raise ConversionError(f'a damaged file: it points to {size} bytes at {start}, beyond its end or the directory')
    return start


def _zip64(extra: bytes, stored: int, size: int, start: int) -> tuple[int, int, int]:
    """The three numbers, those that do not fit 32 bits taken from the extra field of kind 1."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from('<HH', extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            wide = (number for (number,) in struct.iter_unpack('<Q', field[: len(field) // 8 * 8]))
            size, stored, start = (next(wide, n) if n == 0xFFFFFFFF else n for n in (size, stored, start))
    return stored, size, start
