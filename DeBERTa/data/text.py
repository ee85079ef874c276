"""Reading of raw text in blocks.

The memory in use does not depend on the size of the file or of its lines.
"""

import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from DeBERTa.data.tokenizer import find_character_boundary, split_at_spaces
from DeBERTa.errors import DataError

BLOCK_BYTES = 1 << 20
# Longer lines are split: SentencePiece adds up scores in float32, and its memory grows with the line.
MAX_LINE_BYTES = 64 << 10
# A vocabulary is trained on at most this much, spread evenly over the text: SentencePiece takes 20 times the
# memory.
TRAINING_BYTES = 100 << 20

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class TextFile:
    """A text file, also `.gz` or `.xz`, read once in blocks.

    Raises `DataError` if the file does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"no text file {path}: it does not exist; check the path")
        self.path = path
        self.bytes_on_disk = path.stat().st_size
        self.position = 0  # bytes of the file on disk that were read

    def read_blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
        """Yield blocks of at most `block_bytes`, each with its offset in the text.

        A block ends with a line. If a line is longer than a block, the block ends at a space or else between
        two characters. A byte order mark is skipped. Raises `DataError` for UTF-16 and damaged compressed
        files.
        """
        opener = _OPENERS.get(self.path.suffix)
        with self.path.open("rb") as raw:
            text = raw if opener is None else opener(raw)
            read = self._read(text, block_bytes)
            is_last = len(read) < block_bytes
            _refuse_utf16(self.path, read)
            block = read.removeprefix(codecs.BOM_UTF8)
            offset = len(read) - len(block)
            while not is_last:
                end = _find_block_end(block)
                self.position = raw.tell()
                yield offset, block[:end]
                offset += end
                wanted = block_bytes - len(block) + end
                read = self._read(text, wanted)
                is_last = len(read) < wanted
                block = block[end:] + read
        self.position = self.bytes_on_disk
        if block:
            yield offset, block

    def _read(self, text: BufferedIOBase, size: int) -> bytes:
        try:
            return text.read(size)
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(
                f"{self.path} is not a complete {self.path.suffix} file: {error}; copy it again"
            ) from error


def _find_block_end(block: bytes) -> int:
    """Return the end of a block, as an offset in bytes.

    A block ends after a line, else at a space, else between two characters.
    """
    line_end = max(block.rfind(b"\n"), block.rfind(b"\r"))
    if line_end >= 0:
        return line_end + 1
    space = block.rfind(b" ", 1)
    if space > 0:
        return space
    # The last character may be incomplete: it goes to the next block.
    start = find_character_boundary(block, len(block) - 1)
    return start if start > 0 else len(block)


def _refuse_utf16(path: Path, beginning: bytes) -> None:
    """Raise `DataError` for text that looks like UTF-16.

    It has the byte order mark of UTF-16, or many zeros among its even or odd bytes.
    """
    sample = beginning[:4096]
    zeros = max(sample[0::2].count(0), sample[1::2].count(0))
    has_mark = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if has_mark or (len(sample) >= 64 and zeros > 0.3 * len(sample)):
        raise DataError(
            f"{path} is not UTF-8: it looks like UTF-16 or binary data; convert it, for example with iconv"
        )


def decode_block(path: Path, offset: int, block: bytes, errors: str) -> bytes:
    """Return a block as valid UTF-8.

    With `errors` "replace", invalid bytes become U+FFFD; with "strict", the first one raises `DataError`.
    """
    try:
        block.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            return block.decode(errors="replace").encode()
        raise DataError(
            f"{path} is not valid UTF-8 at byte {offset + error.start}: {error.reason}; correct it, or pass "
            "--errors replace to read every invalid byte as U+FFFD"
        ) from None
    return block


def split_lines(block: bytes) -> list[bytes]:
    r"""Split valid UTF-8 at \n, \r\n or \r and nothing else.

    Lines longer than `MAX_LINE_BYTES` are split further; empty ones are dropped.
    """
    if b"\r" in block:
        block = block.replace(b"\r", b"\n")
    lines = block.split(b"\n")
    if len(max(lines, key=len)) > MAX_LINE_BYTES:
        lines = [piece for line in lines for piece in split_at_spaces(line, MAX_LINE_BYTES)]
    return [line for line in lines if line]


def read_training_sentences(path: Path, errors: str) -> Iterator[str]:
    """Yield the lines of a text that a vocabulary is trained on.

    Of a text above 100 MB, only about 100 MB of blocks, spread evenly, are read. Raises `DataError` for text
    that cannot be read.
    """
    file = TextFile(path)
    total = file.bytes_on_disk
    if path.suffix in _OPENERS:
        total = sum(len(block) for _, block in TextFile(path).read_blocks())
    share = min(1.0, TRAINING_BYTES / max(total, 1))
    read = used = 0
    for offset, block in file.read_blocks():
        read += len(block)
        if used < share * read:
            used += len(block)
            for line in split_lines(decode_block(path, offset, block, errors)):
                yield line.decode()
