"""Blocks of raw text, and the documents and lines in them."""

import codecs
import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from DeBERTa.data.tokenizer import find_character_boundary, split_at_spaces
from DeBERTa.errors import DataError

# Longer lines are split: SentencePiece adds up scores in float32, and its memory grows with the line.
MAX_LINE_BYTES = 64 << 10
# Kinds of blocks, by what a document is in them.
TEXT, PARAGRAPHS, LINES, JSON_LINES, STRINGS = "text", "paragraphs", "lines", "JSON lines", "strings"
BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))[ \t]*(?:\r\n|\n|\r(?!\n))")
# An array of objects or strings, an object over several lines, or objects with commas after them.
JSON_VALUE = re.compile(
    rb'\s*(\[\s*(\{\s*"|"[^"\n]*"\s*[,\]])|\{\s*\n\s*"|\{\s*"[^"\n]*"\s*:(\s*\n|[^\n]*(,\s*\n|\n\s*[}"])))'
)
LONG_RECORD = re.compile(rb'\{[ \t]*"')
TAR_MARK = 257  # where a tar archive has "ustar"
ARCHIVES = {
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "lz4 data", b"\x1f\x9d": "a .Z file", b"%PDF-": "a PDF document",
    b"\x1f\x8b": "gzip data", b"\xfd7zXZ": "xz data", b"\x28\xb5\x2f\xfd": "Zstandard data",
}  # fmt: skip
MAX_BAD_SHARE = 0.05  # of invalid bytes and control characters in text


class Block(NamedTuple):
    """A piece of a file that holds complete documents.

    Attributes:
        offset: where the block begins in the decompressed file, in bytes.
        kind: TEXT (not split into documents), PARAGRAPHS (a blank line ends a document), LINES, JSON_LINES,
            or STRINGS.
        data: bytes as in the file; with STRINGS, the documents as valid UTF-8.
    """

    path: Path
    offset: int
    kind: str
    data: bytes | list[bytes]

    def count_bytes(self) -> int:
        """Return the number of bytes of text."""
        return sum(map(len, self.data)) if isinstance(self.data, list) else len(self.data)


def find_block_end(block: bytes, kind: str) -> int:
    """Return the end of a block in bytes; 0 if it holds no complete JSON record.

    A block ends after a document. If a document is longer, it ends after a line, else at a space, else
    between two characters.
    """
    if kind == JSON_LINES:
        return block.rfind(b"\n") + 1
    if kind == PARAGRAPHS:
        end = max((match.end() for match in BLANK_LINE.finditer(block)), default=0)
        if end:
            return end
    line_end = max(block.rfind(b"\n"), block.rfind(b"\r"))
    if line_end >= 0:
        return line_end + 1
    space = block.rfind(b" ", 1)
    # The last character may be incomplete: it goes to the next block.
    return space if space > 0 else find_character_boundary(block, len(block) - 1) or len(block)


def find_kind(path: Path, beginning: bytes, column: str, has_documents: bool) -> str:
    """Return the kind of the blocks of a file that is not Parquet.

    `beginning`: the first megabyte, without byte order mark. With `column` "", JSON lines are plain text.
    Without `has_documents`, text is not split into documents. Raises `DataError` for JSON that is not one
    value per line.
    """
    first, end, _ = beginning.lstrip().partition(b"\n")
    if column and (JSON_VALUE.match(beginning) or _has_several_objects(first)):
        advice = "convert it, for example with jq -c '.[]', or pass --column '' to read it as plain text"
        raise DataError(f"{path} is JSON, but not one value per line; {advice}")
    if column and first.startswith(b"{"):
        try:
            json.loads(first)  # an object
            return JSON_LINES
        except RecursionError:
            return JSON_LINES  # reading the record raises an error that names the place
        except ValueError:
            if not end and LONG_RECORD.match(first):  # longer than a block
                return JSON_LINES
    if not has_documents:
        return TEXT
    return PARAGRAPHS if BLANK_LINE.search(beginning) else LINES


def _has_several_objects(line: bytes) -> bool:
    if not LONG_RECORD.match(line):
        return False
    with contextlib.suppress(ValueError, RecursionError):
        text = line.decode()
        _, end = json.JSONDecoder().raw_decode(text)
        return text[end:].lstrip().startswith("{")
    return False


def refuse_binary(path: Path | str, beginning: bytes) -> None:
    """Raise `DataError` for archives, UTF-16, and what else is not text."""
    for mark, name in ARCHIVES.items():
        if beginning.startswith(mark):
            raise DataError(f"{path} is {name}, not text; extract the text")
    if beginning[TAR_MARK : TAR_MARK + 5] == b"ustar":
        raise DataError(f"{path} is a tar archive, not text; extract its files and give their directory")
    sample = beginning[:4096]
    zeros = max(sample[0::2].count(0), sample[1::2].count(0))
    has_mark = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if has_mark or (len(sample) >= 64 and zeros > 0.3 * len(sample)):
        what = "it looks like UTF-16 or binary data"
        raise DataError(f"{path} is not UTF-8: {what}; convert it, for example with iconv")


def check_utf8(data: bytes, errors: str, where: str, offset: int = 0) -> bytes:
    """Return bytes as valid UTF-8.

    With `errors` "replace", invalid bytes become U+FFFD; with "strict", the first one raises `DataError`,
    which names the place `where` and the byte, counted from `offset`.
    """
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            return data.decode(errors="replace").encode()
        around = data[max(error.start - 2048, 0) : error.start + 2048].decode(errors="replace")
        bad = sum(char == "\ufffd" or (char < " " and char not in "\t\n\r\f\v") for char in around)
        advice = "correct it, or pass --errors replace to read invalid bytes as U+FFFD"
        if bad > max(MAX_BAD_SHARE * len(around), 1):
            advice = "it looks like binary data or another encoding: convert it, for example with iconv"
        what = f"{where} is not valid UTF-8 at byte {offset + error.start}"
        raise DataError(f"{what}: {error.reason}; {advice}") from None
    return data


def read_documents(block: Block, column: str, errors: str) -> list[bytes]:
    """Return the documents of a block as valid UTF-8.

    A block of kind TEXT is returned as one document. `column`: the field of JSON records that holds the text.
    Raises `DataError` for invalid UTF-8 and for records without text.
    """
    if isinstance(block.data, list):
        return block.data
    data = check_utf8(block.data, errors, str(block.path), block.offset)
    if block.kind == TEXT:
        return [data]
    if block.kind == JSON_LINES:
        lines = [line for line in data.split(b"\n") if not line.isspace() and line]
        return [_encode(_read_record(line, block, column), block, errors) for line in lines]
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data.split(b"\n") if block.kind == LINES else BLANK_LINE.split(data)


def _read_record(line: bytes, block: Block, column: str) -> str:
    """Return the text of a JSON record; null is no text."""
    place = f"{block.path}, behind byte {block.offset}, at {line[:60].decode(errors='replace')!r}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested
        raise DataError(f"{place}: a line is not JSON: {error}; correct it") from None
    if not isinstance(record, dict) or not isinstance(record.get(column, 0), str | None):
        fields = ", ".join(record)[:200] if isinstance(record, dict) else "none"
        raise DataError(
            f"{place}: a record has no text in the field {column!r} (fields: {fields}); pass --column"
        )
    return record[column] or ""


def _encode(document: str, block: Block, errors: str) -> bytes:
    try:
        return document.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
        if errors == "replace":
            return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        advice = "correct it, or pass --errors replace to read it as U+FFFD"
        place = f"{block.path}, behind byte {block.offset}"
        raise DataError(f"{place}: a record has half of a surrogate pair; {advice}") from error


def split_lines(text: bytes) -> list[bytes]:
    r"""Split valid UTF-8 at \n, \r\n or \r and nothing else.

    Lines longer than `MAX_LINE_BYTES` are split further; empty ones are dropped.
    """
    if b"\r" in text:
        text = text.replace(b"\r", b"\n")
    lines = text.split(b"\n")
    if len(max(lines, key=len)) > MAX_LINE_BYTES:
        lines = [piece for line in lines for piece in split_at_spaces(line, MAX_LINE_BYTES)]
    return [line for line in lines if line]
