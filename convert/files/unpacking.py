"""What is packed, unpacked into memory: at most so many times the size of the file."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from convert.errors import ConversionError
from convert.files.pickle_reader import Data
from convert.files.zip_directory import Record, quote

UNPACKED = 64 << 20  # what a packed file may always unpack to, in bytes
UNPACKED_TIMES = 16  # ... and in times its own size
DICTIONARY = 256 << 20  # bytes that an xz file may ask for beside

# How a packed file begins -> what unpacks it. joblib.dump(…, compress=3) writes the last three.
_UNPACKERS: dict[bytes, Callable[[], Any]] = {
    b'\x1f\x8b': lambda: zlib.decompressobj(wbits=31),
    b'BZh': bz2.BZ2Decompressor,
    b'\xfd7zXZ': lambda: lzma.LZMADecompressor(memlimit=DICTIONARY),
    b'\x5d\0\0': lambda: lzma.LZMADecompressor(memlimit=DICTIONARY),
    **dict.fromkeys((b'x\x01', b'x\x5e', b'x\x9c', b'x\xda'), zlib.decompressobj),
}


def unpacked_file(data: Data) -> bytes | None:
    """The content of a gzip, bzip2, xz or zlib file; None where it is none. Raises ConversionError."""
    for beginning, unpacker in _UNPACKERS.items():
        if data[: len(beginning)] == beginning:
            most = max(UNPACKED, UNPACKED_TIMES * len(data))
            running = unpacker()
            try:
                content: bytes = running.decompress(memoryview(data), most + 1)
            except (lzma.LZMAError, OSError, zlib.error) as error:
                raise ConversionError(f'a compressed file that does not unpack ({error}): damaged?') from error
            if len(content) > most:
                raise ConversionError(f'a compressed file that would unpack to more than {most} bytes: unpack it first')
            if not running.eof or running.unused_data:
                raise ConversionError('a compressed file that is cut off, or more than one: unpack it first')
            return content
    return None


def unpacked(data: Data, records: Mapping[str, Record]) -> dict[str, memoryview]:
    """The content of each file of a zip archive; a view where it is not compressed. Raises ConversionError."""
    size = sum(record.size for record in records.values() if record.deflated)
    if size > max(UNPACKED, UNPACKED_TIMES * len(data)):
        raise ConversionError(f'an archive of {len(data)} bytes that would unpack to {size}: unpack it first')
    found = {}
    for name, record in records.items():
        content = memoryview(data)[record.start : record.start + record.stored]
        if record.deflated:
            content = memoryview(zlib.decompressobj(-15).decompress(content, record.size + 1))
            if len(content) != record.size or zlib.crc32(content) != record.checksum:
                raise ConversionError(f'a damaged file: {quote(name)} does not unpack to what was packed')
        found[name] = content
    return found
