"""Raw text as people have it: files, directories, patterns and standard input, read in blocks.

What a file holds follows from its first bytes, not from its name: gzip, xz, bzip2 or Zstandard, and in it
Parquet, JSON lines or text. The memory in use does not depend on the size of a file or of its lines.
"""

import codecs
import glob
import hashlib
import json
import lzma
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from DeBERTa.data.files import get_cache_dir, get_state, raise_data_errors, raise_storage_errors
from DeBERTa.data.formats import HEAD_BYTES, PARQUET, open_compressed, read_parquet
from DeBERTa.data.text import (
    STRINGS,
    Block,
    find_block_end,
    find_kind,
    read_documents,
    refuse_binary,
    split_lines,
)
from DeBERTa.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 256 << 20
# A vocabulary is trained on at most this much, spread evenly over the text: SentencePiece takes 20 times the
# memory.
SAMPLE_BYTES = 100 << 20
SAMPLE_BLOCK_BYTES = 64 << 10
STDIN = Path("-")


@dataclass(frozen=True)
class Reading:
    """How raw text is read.

    Attributes:
        column: the field of JSON lines or column of Parquet that holds the text.
        errors: how to treat invalid UTF-8, "strict" (raise) or "replace".
        has_documents: whether plain text is split into documents: at blank lines, or at all line ends if its
            first block has no blank line.
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
            what = "the directory has no files" if given.is_dir() else "it does not exist"
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


def describe_sources(sources: Sequence[Path]) -> dict[str, Any]:
    """Return what tells whether the files changed: a hash of paths, sizes and times."""
    states = [(str(source.resolve()), get_state(source.stat())) for source in sources if source != STDIN]
    return {"inputs_sha256": hashlib.sha256(json.dumps(states).encode()).hexdigest()}


class SourceFile:
    """A file of raw text, read once in blocks.

    `bytes_on_disk` and `position`, the bytes that were read, show the progress. Raises `DataError` if the
    file does not exist.
    """

    def __init__(self, path: Path) -> None:
        if path != STDIN and not path.exists():
            raise DataError(f"no text file {path}: it does not exist; check the path")
        if path.is_dir():
            raise DataError(f"no text file {path}: it is a directory; check the path")
        self.path = Path("standard input") if path == STDIN else path
        self._is_stdin = path == STDIN
        self.bytes_on_disk = 0 if self._is_stdin else path.stat().st_size
        self.position = 0

    def read_blocks(self, reading: Reading) -> Iterator[Block]:
        """Yield the blocks in order.

        A byte order mark is skipped. Raises `DataError` for what is not text, and damaged compressed files.
        """
        with raise_data_errors(self.path), self._open_raw() as raw:
            beginning = raw.read(HEAD_BYTES)
            text, name = open_compressed(self.path, beginning, raw)
            first = self._read(text, name, reading.block_bytes)
            if not first.startswith(PARQUET):
                refuse_binary(self.path, first)
                yield from self._cut(raw, text, name, first, reading)
            elif raw.seekable() and not name:
                yield from self._read_rows(raw, reading)
            else:
                rest = iter(lambda: self._read(text, name, BLOCK_BYTES), b"")
                yield from self._read_copy(chain([first], rest), reading)
        self.position = self.bytes_on_disk

    def _open_raw(self) -> IO[bytes]:
        return open(sys.stdin.fileno(), "rb", closefd=False) if self._is_stdin else self.path.open("rb")

    def _read(self, text: IO[bytes], name: str, size: int) -> bytes:
        if not name:
            return text.read(size)
        try:
            return text.read(size)
        except (lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
            raise DataError(f"{self.path} is not a complete {name} file: {error}; copy it again") from error

    def _cut(
        self, raw: IO[bytes], text: IO[bytes], name: str, first: bytes, reading: Reading
    ) -> Iterator[Block]:
        """Yield the blocks of text or JSON lines; `first` is what was read already."""
        size, is_last = reading.block_bytes, len(first) < reading.block_bytes
        data = first.removeprefix(codecs.BOM_UTF8)
        offset = len(first) - len(data)
        kind = find_kind(self.path, data, reading.column, reading.has_documents)
        while not is_last:
            end = find_block_end(data, kind)
            if end:
                self.position = raw.tell() if raw.seekable() else 0
                yield Block(self.path, offset, kind, data[:end])
                offset += end
            elif len(data) > MAX_RECORD_BYTES:
                raise DataError(f"{self.path}: a JSON record is longer than 256 MB; split its text")
            wanted = size - len(data) + end if end else size
            read = self._read(text, name, wanted)
            is_last = len(read) < wanted
            data = data[end:] + read
        if data:
            yield Block(self.path, offset, kind, data)

    def _read_copy(self, contents: Iterable[bytes], reading: Reading) -> Iterator[Block]:
        """Yield the documents of a Parquet file that cannot be read from its end: it is copied first."""
        cache = get_cache_dir()
        with raise_storage_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache) as copy:
                copy.writelines(contents)
                yield from self._read_rows(copy, reading)

    def _read_rows(self, file: IO[bytes], reading: Reading) -> Iterator[Block]:
        """Yield the documents of a Parquet file."""
        documents: list[str] = []
        offset = size = 0
        for row, share, texts in read_parquet(file, self.path, reading.column):
            documents += texts
            size += sum(map(len, texts))
            if size >= reading.block_bytes:
                self.position = int(self.bytes_on_disk * share)
                yield Block(self.path, offset, STRINGS, documents)
                documents, offset, size = [], row, 0
        if documents:
            yield Block(self.path, offset, STRINGS, documents)


def sample_lines(sources: Sequence[Path], reading: Reading) -> list[bytes]:
    """Return lines of the texts, at most about 100 MB, spread evenly.

    Raises `DataError` for text that cannot be read.
    """
    return [
        line
        for document in sample_documents(sources, reading, SAMPLE_BYTES)
        for line in split_lines(document)
    ]


def sample_documents(sources: Sequence[Path], reading: Reading, most: int) -> list[bytes]:
    """Return documents of the texts, at most about `most` bytes, spread evenly.

    Every `stride`-th block is kept; the stride doubles whenever there are too many.
    """
    kept: list[Block] = []
    stride, size, number = 1, 0, 0
    for source in sources:
        for block in SourceFile(source).read_blocks(reading):
            if number % stride == 0:
                kept.append(block)
                size += block.count_bytes()
            number += 1
            if size > most and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
                size = sum(each.count_bytes() for each in kept)
    return [text for block in kept for text in read_documents(block, reading.column, reading.errors)]
