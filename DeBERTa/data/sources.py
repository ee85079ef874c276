"""Raw text as people have it, read in blocks.

It comes from files, directories, patterns and standard input. What a file holds follows from its first bytes,
not from its name: gzip, xz, bzip2 or Zstandard, and in it Parquet, JSON lines or text. The memory in use does
not depend on the size of a file or of its lines.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from tqdm import tqdm

from DeBERTa.data.compression import DECOMPRESSION_ERRORS, ResumedStream, import_pyarrow, open_compressed
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
from DeBERTa.errors import DataError
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


def find_sources(inputs: Iterable[Path], is_output: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Return the files that the inputs name, in order.

    A directory stands for all files in it and below, a pattern for what matches, both in the order of their
    names and each file once; files that `is_output` holds for are skipped, and in directories hidden files
    and those that begin with "_". "-" is standard input. Raises `DataError` if an input names no file, or a
    file or directory below one cannot be read.
    """
    sources: list[Path] = []
    for given in inputs:
        if given == STDIN or given.is_file():
            sources.append(given)
            continue
        matches = [given]
        if not given.exists():
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207 (absolute ones too)
        visited: set[Path] = set()
        found: dict[Path, Path] = {}
        for file in chain.from_iterable(_list_files(match, visited) for match in matches):
            found.setdefault(file.resolve(), file)
        read = [file for path, file in found.items() if not is_output(path)]
        if not read:
            what = "the directory has no files that are not hidden" if given.is_dir() else "it does not exist"
            what = "all files there are outputs of this command" if found else what
            raise DataError(f"no text file {given}: {what}; check the path")
        sources += read
    if sources.count(STDIN) > 1:
        raise DataError("cannot read standard input twice: it ends once; give - once")
    return sources


def _list_files(path: Path, visited: set[Path]) -> list[Path]:
    """Return a file itself, or the files below a directory that is not visited yet.

    Links can form circles, and name a directory twice.
    """
    if not path.is_dir():
        return [path]
    files: list[Path] = []

    def refuse(error: OSError) -> NoReturn:
        what = f"cannot read {error.filename}: {error.strerror}"
        raise DataError(f"{what}; check its permissions") from error

    with raise_data_errors(path):
        for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
            here = Path(folder).resolve()
            is_new = here not in visited
            visited.add(here)
            # Sorted: which of two names of a directory is visited first must not depend on the disk.
            folders[:] = sorted(name for name in folders if name[0] not in "._" and is_new)
            files += [Path(folder, name) for name in names if name[0] not in "._" and is_new]
    for file in files:
        if not file.exists():
            raise DataError(f"cannot read {file}: it is a link to nothing; remove it")
    return sorted(file for file in files if file.is_file())


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
        except DECOMPRESSION_ERRORS as error:
            if not self._compression:
                raise
            what = f"{self.path} is damaged, cut off, or not {self._compression} data to its end"
            raise DataError(f"{what}: {error}; copy it again, or decompress it by hand") from error

    def _cut(self, first: bytes, reading: Reading) -> Iterator[Block]:
        """Yield the blocks of text or JSON lines; `first` is the first megabyte."""
        data = first.removeprefix(codecs.BOM_UTF8)
        offset = len(first) - len(data)
        kind = find_kind(self.path, data, reading.column, reading.has_documents)
        # From its beginning again: blocks may be smaller than `first`.
        self._stream = io.BufferedReader(ResumedStream(data, self._stream))
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
        pyarrow = import_pyarrow(self.path, "Parquet")
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
    reading = replace(reading, block_bytes=SAMPLE_BLOCK_BYTES)
    documents = sample_documents(sources, reading, SAMPLE_BYTES)
    return [line for document in documents for line in split_lines(document)]


def sample_documents(sources: Sequence[Path], reading: Reading, most: int) -> list[bytes]:
    """Return documents of the texts, at most about `most` bytes, spread evenly.

    Every `stride`-th block is taken; the stride doubles whenever there are too many.
    """
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
