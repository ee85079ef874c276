"""Raw text in blocks of about a megabyte, so that memory does not grow with the file, nor with its longest line."""

import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from DeBERTa.data.tokenizer import find_character_boundary, split_at_spaces
from DeBERTa.errors import DataError

BLOCK_BYTES = 1 << 20
# Longer lines are encoded in parts: SentencePiece adds up scores in float32, and its memory grows with the line.
MAX_LINE_BYTES = 64 << 10
# A vocabulary is trained on at most this much, spread evenly over the text; SentencePiece takes 20 times the memory.
TRAINING_BYTES = 100 << 20

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class TextFile:
    """A text file, also `.gz` or `.xz`, read once in blocks.

    Attributes:
        path: the file.
        bytes_on_disk: its size.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise DataError(f"There is no text file {path}.")
        self.path = path
        self.bytes_on_disk = path.stat().st_size
        self._raw: BinaryIO | None = None

    def position(self) -> int:
        """How many bytes of the file on disk have been read."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.bytes_on_disk

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
        """Blocks of at most `block_bytes` and where each begins, in bytes of (decompressed) text.

        A block ends with a line, or if a line is longer than a block, at a space or between two characters. A byte
        order mark at the beginning is left out. Raises DataError for UTF-16 and for broken compressed files.
        """
        with self.path.open("rb") as self._raw:
            opener = _OPENERS.get(self.path.suffix)
            text = self._raw if opener is None else opener(self._raw)
            offset = 0
            rest = b""
            while True:
                wanted = block_bytes - len(rest)
                read = self._read(text, wanted)
                is_last = len(read) < wanted
                if offset == 0 and not rest:
                    _refuse_utf16(self.path, read)
                    if read.startswith(codecs.BOM_UTF8):
                        offset = len(codecs.BOM_UTF8)
                        read = read[offset:]
                block = rest + read
                if is_last:
                    break
                cut = _cut(block)
                yield offset, block[:cut]
                offset += cut
                rest = block[cut:]
            if block:
                yield offset, block

    def _read(self, text: BinaryIO, size: int) -> bytes:
        try:
            return text.read(size)
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"{self.path} is not a complete {self.path.suffix} file: {error}.") from error


def _cut(block: bytes) -> int:
    """Where to end a block: after its last line, else at its last space, else at a character; behind its first byte."""
    line_end = max(block.rfind(b"\n"), block.rfind(b"\r"))
    if line_end >= 0:
        return line_end + 1
    space = block.rfind(b" ", 1)
    if space > 0:
        return space
    # The last character may be cut in two: it goes to the next block.
    start = find_character_boundary(block, len(block) - 1)
    return start if start > 0 else len(block)


def _refuse_utf16(path: Path, beginning: bytes) -> None:
    """UTF-16 has a byte order mark or, in most scripts, zeros in nearly every second byte."""
    sample = beginning[:4096]
    zeros = max(sample[0::2].count(0), sample[1::2].count(0))
    marked = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or (len(sample) >= 64 and zeros > 0.3 * len(sample)):
        raise DataError(
            f"{path} looks like UTF-16 or binary data: convert it to UTF-8, for example with iconv."
        )


def decode_block(path: Path, offset: int, block: bytes, errors: str) -> bytes:
    """The block as valid UTF-8; with `errors` "strict" DataError names the first bad byte, "replace" puts U+FFFD."""
    try:
        block.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            return block.decode(errors="replace").encode()
        raise DataError(
            f"{path} is not valid UTF-8 at byte {offset + error.start}: correct it, or pass --errors replace "
            "to read every bad byte as U+FFFD."
        ) from None
    return block


def split_lines(block: bytes) -> list[bytes]:
    r"""Lines of valid UTF-8, ended by \n, \r\n or \r and nothing else; long ones cut in parts, empty ones left out."""
    if b"\r" in block:
        block = block.replace(b"\r", b"\n")
    lines = block.split(b"\n")
    if len(max(lines, key=len)) > MAX_LINE_BYTES:
        lines = [part for line in lines for part in split_at_spaces(line, MAX_LINE_BYTES)]
    return [line for line in lines if line]


def read_training_sentences(path: Path, errors: str) -> Iterator[str]:
    """Lines to train a vocabulary on: all of them, or of a large text about 100 MB of whole blocks, evenly spread."""
    file = TextFile(path)
    total = file.bytes_on_disk
    if path.suffix in _OPENERS:
        total = sum(len(block) for _, block in TextFile(path).blocks())
    share = min(1.0, TRAINING_BYTES / max(total, 1))
    read = taken = 0
    for offset, block in file.blocks():
        read += len(block)
        if taken < share * read:
            taken += len(block)
            for line in split_lines(decode_block(path, offset, block, errors)):
                yield line.decode()
