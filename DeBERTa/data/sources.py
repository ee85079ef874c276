"""Raw text as people have it, read in blocks.

It comes from files, directories, patterns and standard input. What a file holds follows from its first bytes,
not from its name: gzip, xz, bzip2 or Zstandard, and in it Parquet, JSON lines or text. The memory in use does
not depend on the size of a file or of its lines.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from tqdm import tqdm

from DeBERTa.data.text import (
    STRINGS,
    Block,
    check_utf8,
    find_block_end,
    find_kind,
    read_documents,
    refuse_binary,
    split_lines,
)
from DeBERTa.errors import ConfigError, DataError
from DeBERTa.files import get_cache_dir, get_state, raise_data_errors, raise_storage_errors

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 256 << 20
# A vocabulary is trained on at most this much, spread evenly over the text: SentencePiece takes 20 times the
# memory.
SAMPLE_BYTES = 100 << 20
SAMPLE_BLOCK_BYTES = 64 << 10
STDIN = Path("-")
HEAD_BYTES = 512
PARQUET = b"PAR1"
LZMA = b"\x5d\0\0"  # of the format before xz, .lzma
BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # after "BZh" and a digit: a block, or the end of an empty file
ROWS = 64  # of Parquet, per batch
TEXT_TYPES = re.compile(r"(large_)?string|dictionary<values=(large_)?string")


@dataclass(frozen=True)
class Reading:
    """How raw text is read.

    Attributes:
        column: the field of JSON lines or column of Parquet that holds the text.
        errors: how to treat invalid UTF-8, "strict" (raise) or "replace".
        has_documents: whether plain text is split into documents: at blank lines, or at all line ends if its
            first megabyte has no blank line.
        block_bytes: bytes of text per block.
    """

    column: str = "text"
    errors: str = "strict"
    has_documents: bool = False
    block_bytes: int = BLOCK_BYTES


def find_sources(inputs: Iterable[Path]) -> list[Path]:
    """Return the files that the inputs name, in order.

    A directory stands for all files in it and below, a pattern for what matches, both in the order of their
    names; hidden files and those that begin with "_" are skipped in directories. "-" is standard input.
    Raises `DataError` if an input names no file.
    """
    sources: list[Path] = []
    for given in inputs:
        matches = [given]
        if given != STDIN and not given.exists():
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207 (absolute ones too)
        found = [source for match in matches for source in _list_files(match)]
        if not found:
            what = "the directory has no files that are not hidden" if given.is_dir() else "it does not exist"
            raise DataError(f"no text file {given}: {what}; check the path")
        sources += found
    if sources.count(STDIN) > 1:
        raise DataError("cannot read standard input twice: it ends once; give - once")
    return sources


def _list_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(p[0] in "._" for p in file.relative_to(path).parts))


def name_sources(sources: Sequence[Path]) -> str:
    """Return what messages call these files."""
    first = "standard input" if sources[0] == STDIN else str(sources[0])
    return first if len(sources) == 1 else f"{first} and {len(sources) - 1} more"


def hash_states(sources: Sequence[Path]) -> str:
    """Return what tells whether the files changed: a hash of paths, sizes and times."""
    states = [(str(source.resolve()), get_state(source.stat())) for source in sources if source != STDIN]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


class SourceFile:
    """A file of raw text, read once in blocks.

    `bytes_on_disk` and `position`, the bytes that were read, show the progress.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path("standard input") if path == STDIN else path
        self._is_stdin = path == STDIN
        self.bytes_on_disk = 0 if self._is_stdin else path.stat().st_size
        self.position = 0

    def read_blocks(self, reading: Reading) -> Iterator[Block]:
        """Yield the blocks in order.

        A byte order mark is skipped. Raises `DataError` for what is not text, for damaged compressed files,
        and at the end for a file that became shorter.
        """
        with raise_data_errors(self.path), self._open_raw() as self._raw:
            beginning = self._raw.read(HEAD_BYTES)
            self._stream, self._compression = open_compressed(self.path, beginning, self._raw)
            first = self._read(BLOCK_BYTES)
            if not first.startswith(PARQUET):
                refuse_binary(f"{self.path} (decompressed)" if self._compression else self.path, first)
                yield from self._cut(first, reading)
            elif self._raw.seekable() and not self._compression:
                yield from self._read_rows(self._raw, reading)
            else:
                yield from self._read_copy(first, reading)
            size = os.fstat(self._raw.fileno()).st_size
            if size < self.bytes_on_disk:
                change = f"from {self.bytes_on_disk:,} to {size:,} bytes"
                raise DataError(
                    f"{self.path} was cut off while it was read, {change}; prepare it when it is complete"
                )

    def _open_raw(self) -> IO[bytes]:
        return open(sys.stdin.fileno(), "rb", closefd=False) if self._is_stdin else self.path.open("rb")

    def _read(self, size: int) -> bytes:
        """Return the next bytes of the decompressed content; fewer at its end."""
        try:
            return self._stream.read(size)
        except (lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
            if not self._compression:
                raise
            what = f"{self.path} is not a complete {self._compression} file"
            raise DataError(f"{what}: {error}; copy it again") from error

    def _cut(self, first: bytes, reading: Reading) -> Iterator[Block]:
        """Yield the blocks of text or JSON lines; `first` is the first megabyte."""
        data = first.removeprefix(codecs.BOM_UTF8)
        offset = len(first) - len(data)
        kind = find_kind(self.path, data, reading.column, reading.has_documents)
        self._stream = io.BufferedReader(_Resumed(data, self._stream))  # blocks may be smaller than `first`
        size = reading.block_bytes
        data = self._read(size)
        is_last = len(data) < size
        while not is_last:
            end = find_block_end(data, kind)
            if end:
                self.position = self._raw.tell() if self._raw.seekable() else 0
                yield Block(self.path, offset, kind, data[:end])
                offset += end
            elif len(data) > MAX_RECORD_BYTES:
                raise DataError(f"{self.path}: a JSON record is longer than 256 MB; split its text")
            wanted = size - len(data) + end if end else size
            read = self._read(wanted)
            is_last = len(read) < wanted
            data = data[end:] + read
        if data:
            yield Block(self.path, offset, kind, data)

    def _read_copy(self, first: bytes, reading: Reading) -> Iterator[Block]:
        """Yield the documents of a Parquet file that is copied first.

        It cannot be read from its end where it is.
        """
        cache = get_cache_dir()
        with raise_storage_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache) as copy:
                copy.writelines(chain([first], iter(lambda: self._read(BLOCK_BYTES), b"")))
                yield from self._read_rows(copy, reading)

    def _read_rows(self, file: IO[bytes], reading: Reading) -> Iterator[Block]:
        """Yield the documents of a column of a Parquet file; null is no text.

        Raises `DataError` if the column has no text, or the file is damaged.
        """
        pyarrow = _import_pyarrow(self.path, "Parquet")
        documents: list[bytes] = []
        offset = row = size = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            fields = {field.name: str(field.type) for field in table.schema_arrow}
            if not TEXT_TYPES.match(fields.get(reading.column, "")):
                shown = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
                what = f"{self.path} has no text in the column {reading.column!r}"
                raise DataError(f"{what} (columns: {shown}); pass --column")
            for batch in table.iter_batches(ROWS, columns=[reading.column]):
                for text in _convert_to_bytes(batch.column(0)):
                    row += 1
                    if text:
                        documents.append(check_utf8(text, reading.errors, f"{self.path}, row {row},"))
                        size += len(text)
                if size >= reading.block_bytes:
                    self.position = self.bytes_on_disk * row // max(table.metadata.num_rows, 1)
                    yield Block(self.path, offset, STRINGS, documents)
                    documents, offset, size = [], row, 0
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.path} is not a complete Parquet file: {reason}; copy it again") from error
        if documents:
            yield Block(self.path, offset, STRINGS, documents)


def _convert_to_bytes(column: Any) -> list[bytes | None]:
    """Return the rows of an Arrow column of text, which need not be valid UTF-8."""
    if hasattr(column, "dictionary_decode"):
        column = column.dictionary_decode()
    return column.cast("large_binary").to_pylist()


def open_compressed(path: Path, beginning: bytes, rest: IO[bytes]) -> tuple[IO[bytes], str]:
    """Return a stream of decompressed content, and its compression or "".

    `beginning` and `rest` are the file `path`. Raises `ConfigError` if Zstandard cannot be read here.
    """
    stream: Any = io.BufferedReader(_Resumed(beginning, rest))
    if beginning.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(stream)), "gzip"
    if beginning.startswith((b"\xfd7zXZ\0", LZMA)):
        return lzma.open(stream), "xz"
    if beginning.startswith(b"BZh") and beginning[4:10] in BZIP2:
        return bz2.open(stream), "bzip2"
    if beginning[:4] == b"\x28\xb5\x2f\xfd" or beginning[1:4] == b"\x2a\x4d\x18":
        pyarrow = _import_pyarrow(path, "Zstandard")
        decompressed = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")
        return io.BufferedReader(decompressed), "Zstandard"
    return stream, ""


class _Resumed(io.RawIOBase):
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


def _import_pyarrow(path: Path, name: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"cannot read {path}: {name} needs the package pyarrow; install it with pip install pyarrow"
        ) from error
    return pyarrow


def read_files(files: Sequence[SourceFile], reading: Reading, bar: tqdm) -> Iterator[Block]:
    """Yield the blocks of all files, with a progress bar over their bytes on disk."""
    for file in files:
        before = bar.n
        for block in file.read_blocks(reading):
            bar.update(before + file.position - bar.n)
            yield block
        bar.update(before + file.bytes_on_disk - bar.n)


def sample_lines(sources: Sequence[Path], reading: Reading) -> list[bytes]:
    """Return lines of the texts, at most about 100 MB, spread evenly.

    Raises `DataError` for text that cannot be read.
    """
    documents = sample_documents(sources, reading, SAMPLE_BYTES)
    return [line for document in documents for line in split_lines(document)]


def sample_documents(sources: Sequence[Path], reading: Reading, most: int) -> list[bytes]:
    """Return documents of the texts, at most about `most` bytes, spread evenly.

    Every `stride`-th block is taken; the stride doubles whenever there are too many.
    """
    reading = replace(reading, block_bytes=SAMPLE_BLOCK_BYTES)
    sampled: list[Block] = []
    stride, size = 1, 0
    blocks = chain.from_iterable(SourceFile(source).read_blocks(reading) for source in sources)
    for number, block in enumerate(blocks):
        if number % stride == 0:
            sampled.append(block)
            size += block.count_bytes()
        if size > most and len(sampled) > 1:
            sampled, stride = sampled[::2], 2 * stride
            size = sum(each.count_bytes() for each in sampled)
    return [text for block in sampled for text in read_documents(block, reading.column, reading.errors)]
