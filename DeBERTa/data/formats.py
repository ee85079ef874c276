"""Formats around text: compression, by the first bytes of a file, and Parquet."""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from DeBERTa.errors import ConfigError, DataError

HEAD_BYTES = 512
PARQUET = b"PAR1"
ROWS = 64  # of Parquet, per batch
TEXT_TYPES = re.compile(r"(large_)?string|dictionary<values=(large_)?string")


def open_compressed(path: Path, beginning: bytes, rest: IO[bytes]) -> tuple[IO[bytes], str]:
    """Return a stream of the decompressed content, and the name of the compression or "".

    `beginning` and `rest` are the file `path`. Raises `ConfigError` if Zstandard cannot be read here.
    """
    stream: Any = io.BufferedReader(_Resumed(beginning, rest))
    if beginning.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(stream)), "gzip"
    if beginning.startswith(b"\xfd7zXZ\0"):
        return lzma.open(stream), "xz"
    if beginning.startswith(b"BZh") and beginning[4:10] == b"1AY&SY":
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


def read_parquet(file: IO[bytes], path: Path, column: str) -> Iterator[tuple[int, float, list[str]]]:
    """Yield the rows read so far, their share, and the next texts of a column; null is no text.

    Raises `DataError` if the column has no text, or the file is damaged.
    """
    pyarrow = _import_pyarrow(path, "Parquet")
    try:
        table = pyarrow.parquet.ParquetFile(file)
        fields = {field.name: str(field.type) for field in table.schema_arrow}
        if not TEXT_TYPES.match(fields.get(column, "")):
            shown = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
            raise DataError(f"{path} has no text in the column {column!r} (columns: {shown}); pass --column")
        row = 0
        for batch in table.iter_batches(ROWS, columns=[column]):
            row += len(batch)
            yield row, row / table.metadata.num_rows, [text for text in batch.column(0).to_pylist() if text]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a complete Parquet file: {error}; copy it again") from error


def _import_pyarrow(path: Path, name: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"cannot read {path}: {name} needs the package pyarrow; install it with pip install pyarrow"
        ) from error
    return pyarrow
