"""Decompression of files, by their first bytes: gzip, xz, bzip2 and Zstandard."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from DeBERTa.errors import ConfigError

CHUNK_BYTES = 64 << 10
LZMA = b"\x5d\0\0"  # of the format before xz, .lzma
BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # after "BZh" and a digit: a block, or the end of an empty file
# What reading a damaged file raises.
DECOMPRESSION_ERRORS = (lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)


def open_compressed(path: Path, beginning: bytes, rest: IO[bytes]) -> tuple[IO[bytes], str]:
    """Return a stream of decompressed content, and its compression or "".

    `beginning` and `rest` are the file `path`. Raises `ConfigError` if Zstandard cannot be read here.
    """
    stream: Any = io.BufferedReader(ResumedStream(beginning, rest))
    if beginning.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(stream)), "gzip"
    if beginning.startswith((b"\xfd7zXZ\0", LZMA)):
        return io.BufferedReader(_Decompressed(stream, lzma.LZMADecompressor)), "xz"
    if beginning.startswith(b"BZh") and beginning[4:10] in BZIP2:
        return io.BufferedReader(_Decompressed(stream, bz2.BZ2Decompressor)), "bzip2"
    if beginning[:4] == b"\x28\xb5\x2f\xfd" or beginning[1:4] == b"\x2a\x4d\x18":
        pyarrow = import_pyarrow(path, "Zstandard")
        decompressed = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")
        return io.BufferedReader(decompressed), "Zstandard"
    return stream, ""


class ResumedStream(io.RawIOBase):
    """A stream whose beginning was read already."""

    def __init__(self, beginning: bytes, rest: IO[bytes]) -> None:
        self._beginning, self._rest = io.BytesIO(beginning), rest

    def readable(self) -> bool:
        """Return whether the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer; return how many."""
        data = self._beginning.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Decompressed(io.RawIOBase):
    """The content of compressed streams that follow each other.

    Parallel compressors write such files. Zeros may stand between the streams. `bz2.open` and `lzma.open` end
    without an error at a later stream whose beginning is damaged, and at zeros in front of one.
    """

    def __init__(self, compressed: IO[bytes], create: Callable[[], Any]) -> None:
        self._compressed, self._create, self._decompressor = compressed, create, create()

    def readable(self) -> bool:
        """Return whether the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer; return how many.

        Raises one of `DECOMPRESSION_ERRORS` if the data is damaged or ends too early.
        """
        content = b""
        while not content:
            data = b""
            if self._decompressor.eof:
                data = self._skip_zeros(self._decompressor.unused_data)
                if not data:
                    return 0
                self._decompressor = self._create()
            elif self._decompressor.needs_input:
                data = self._compressed.read(CHUNK_BYTES)
                if not data:
                    raise EOFError("it ends too early")
            content = self._decompressor.decompress(data, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _skip_zeros(self, data: bytes) -> bytes:
        """Return the beginning of the next stream; nothing at the end of the file."""
        data = data.lstrip(b"\0")
        while not data and (chunk := self._compressed.read(CHUNK_BYTES)):
            data = chunk.lstrip(b"\0")
        return data


def import_pyarrow(path: Path, name: str) -> ModuleType:
    """Return the package that reads Parquet and Zstandard.

    Raises `ConfigError`, which names the file, if it is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"cannot read {path}: {name} needs the package pyarrow; install it with pip install pyarrow"
        ) from error
    return pyarrow
