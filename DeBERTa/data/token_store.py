"""The ids of a prepared text, memory-mapped from a cache beside it.

A prepared text `train.txt` (one sequence a line, pieces separated by single spaces) is what people see and move around.
Beside it lies the folder `train.txt.ids`:

    tokens.int32     the ids of all lines, one after the other
    offsets.int64    where each line begins in `tokens`, and the end of the last one
    meta.json        which text and which vocabulary these ids are of, and counts

A cache that does not match its text and vocabulary is rebuilt from the text. Where the text's folder cannot be written,
the cache goes to `id-cache` in the cache directory. Folders are filled under another name and then renamed.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.files import _lock, get_cache_dir
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, VocabularyError

FORMAT = 1
BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20  # no sequence is that long: such a file is not prepared text
MAX_UNKNOWN_SHARE = 0.01


@dataclass
class TokenStore:
    """Ids of a prepared text; `tokens` int32 [num_tokens] and `offsets` int64 [lines + 1] are memory-mapped."""

    tokens: np.ndarray
    offsets: np.ndarray
    lines: int
    num_tokens: int
    longest: int  # tokens in the longest line
    longest_line: int  # its number in the file, from 1
    unknown: int  # pieces that are not in the vocabulary, other than a written [UNK]
    text_sha256: str

    def __len__(self) -> int:
        return self.lines

    def line(self, index: int) -> np.ndarray:
        """Ids of one line, int32 [tokens of the line], without special ids."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_store(text: Path, tokenizer: Tokenizer, max_tokens: int, progress: bool = True) -> TokenStore:
    """Open the ids of a prepared text, building the cache first if there is none that matches.

    Raises DataError if the text is missing or empty or has a line of more than `max_tokens` pieces, VocabularyError if
    it was prepared with another vocabulary or more than 1 % of its pieces are not in this one.
    """
    text = Path(text)
    if not text.is_file():
        raise DataError(f"There is no prepared text {text}; prepare_data.py makes it.")
    folders = (ids_folder(text), _fallback_folder(text))
    store = _open_valid(text, tokenizer, folders)
    if store is None:
        with text.open("rb") as file:
            _lock(file, text)
            # Another process may have built it while this one waited for the lock.
            store = _open_valid(text, tokenizer, folders)
            if store is None:
                _refuse_other_vocabulary(text, tokenizer)
                _build(text, file, tokenizer, folders, progress)
                store = _open_valid(text, tokenizer, folders)
        if store is None:
            raise DataError(f"{text} changed while it was read; wait until it is complete and start again.")
    if store.longest > max_tokens:
        raise DataError(
            f"{text}, line {store.longest_line}, has {store.longest} tokens, but --max_seq_length {max_tokens + 2} "
            f"allows {max_tokens} ([CLS] and [SEP] take two): prepare the text for this length, or raise it."
        )
    if store.unknown and progress:
        print(
            f"warning: {store.unknown} of {store.num_tokens} pieces in {text} are not in the vocabulary "
            f"{tokenizer.path} and are read as [UNK]",
            file=sys.stderr,
        )
    return store


def _refuse_other_vocabulary(text: Path, tokenizer: Tokenizer) -> None:
    """Two vocabularies can share nearly all pieces, so what prepare_data.py recorded says more than the text."""
    meta = read_meta(ids_folder(text))
    if meta is not None and "prepared" in meta and matches(meta, text, meta["vocabulary"]):
        raise VocabularyError(
            f"{text} was prepared with the vocabulary {meta['prepared']['vocabulary_path']}, which {tokenizer.path} is "
            f"not: pass the former as --vocab_path, or prepare the text again. (Without {ids_folder(text)} its pieces "
            "are looked up in any vocabulary.)"
        )


def ids_folder(text: Path) -> Path:
    """Where the ids of a prepared text belong."""
    return text.with_name(text.name + ".ids")


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The `meta.json` of a cache folder, or None if there is no readable one of this format."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def matches(meta: dict[str, Any], text: Path, vocabulary_fingerprint: str) -> bool:
    """Whether a cache was made from this text, as it is now, with this vocabulary."""
    status = text.stat()
    return (
        meta["text_bytes"] == status.st_size
        and meta["text_mtime_ns"] == status.st_mtime_ns
        and meta["vocabulary"] == vocabulary_fingerprint
    )


class TokenStoreWriter:
    """Fills a cache folder: `append` the ids in order, then `commit`. Leaving the context removes what is left over.

    Args:
        staging: the folder to fill; `commit` renames it. Removed first if it exists.
    """

    def __init__(self, staging: Path):
        self.staging = staging
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        self._tokens = (staging / "tokens.int32").open("wb")
        self._offsets = (staging / "offsets.int64").open("wb")
        self._offsets.write(np.zeros(1, np.int64).tobytes())
        self.lines = 0
        self.num_tokens = 0

    def append(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Add ids, int32 [n], and the lines that are complete with them.

        `ends`: int64, ascending; for each of these lines the number of tokens in the store up to and with its last one.
        """
        self._tokens.write(np.ascontiguousarray(ids, np.int32))
        self.num_tokens += len(ids)
        self._offsets.write(np.ascontiguousarray(ends, np.int64))
        self.lines += len(ends)

    def commit(self, folder: Path, meta: dict[str, Any]) -> None:
        """Write `meta.json`, last, and put the folder in its place, over an older one.

        `meta`: text_bytes, text_mtime_ns, text_sha256, vocabulary (its fingerprint), longest, longest_line, unknown,
        and from prepare_data.py `prepared`, which says from what the text was made.
        """
        self._close(sync=True)
        counts = {"format": FORMAT, "lines": self.lines, "num_tokens": self.num_tokens}
        (self.staging / "meta.json").write_text(json.dumps(counts | meta, indent=1) + "\n")
        _replace_folder(self.staging, folder)

    def _close(self, sync: bool) -> None:
        for file in (self._tokens, self._offsets):
            if sync:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close(sync=False)
        shutil.rmtree(self.staging, ignore_errors=True)


def _replace_folder(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; a folder that is there moves into `staging` first, so that none is left over."""
    previous = staging / "previous"
    while True:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(previous)
        try:
            staging.rename(folder)
            break
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(
                previous, ignore_errors=True
            )  # another process was faster; take its folder away in turn
    shutil.rmtree(folder / "previous", ignore_errors=True)


def _fallback_folder(text: Path) -> Path:
    name = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:32]
    return get_cache_dir() / "id-cache" / name


def _open_valid(text: Path, tokenizer: Tokenizer, folders: tuple[Path, ...]) -> TokenStore | None:
    for folder in folders:
        meta = read_meta(folder)
        if meta is None or not matches(meta, text, tokenizer.fingerprint):
            continue
        try:
            tokens = np.memmap(folder / "tokens.int32", np.int32, mode="r")
            offsets = np.memmap(folder / "offsets.int64", np.int64, mode="r")
        except (OSError, ValueError):
            continue
        if len(tokens) != meta["num_tokens"] or len(offsets) != meta["lines"] + 1:
            continue
        return TokenStore(
            tokens=tokens,
            offsets=offsets,
            lines=meta["lines"],
            num_tokens=meta["num_tokens"],
            longest=meta["longest"],
            longest_line=meta["longest_line"],
            unknown=meta["unknown"],
            text_sha256=meta["text_sha256"],
        )
    return None


def _build(
    text: Path, file: BinaryIO, tokenizer: Tokenizer, folders: tuple[Path, ...], progress: bool
) -> None:
    folder, staging = _new_staging(text, folders)
    status = os.fstat(file.fileno())
    reader = _LineReader(text, file, tokenizer)
    with (
        TokenStoreWriter(staging) as writer,
        tqdm(
            desc=f"reading {text.name}", total=status.st_size, unit="B", unit_scale=True, disable=not progress
        ) as bar,
    ):
        while block := reader.read():
            ids, ends = reader.parse(block)
            writer.append(ids, writer.num_tokens + ends)
            bar.update(len(block))
        if writer.lines == 0:
            raise DataError(f"{text} has no lines of tokens; prepare it again.")
        reader.refuse_foreign_text(writer.num_tokens)
        writer.commit(
            folder,
            {
                "text_bytes": status.st_size,
                "text_mtime_ns": status.st_mtime_ns,
                "text_sha256": reader.sha256.hexdigest(),
                "vocabulary": tokenizer.fingerprint,
                "longest": reader.longest,
                "longest_line": reader.longest_line,
                "unknown": reader.ids.unknown,
            },
        )


def _new_staging(text: Path, folders: tuple[Path, ...]) -> tuple[Path, Path]:
    """The first of the folders that can be written, and a new one of another name beside it to fill."""
    reason = ""
    for folder in folders:
        prefix = f"{folder.name}.rebuild-"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left_over in folder.parent.glob(f"{glob.escape(prefix)}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            return folder, Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        except OSError as error:
            reason = error.strerror
    raise DataError(f"Cannot write the token ids of {text} to {folders[0]} nor to {folders[1]}: {reason}.")


class _PieceIds(dict):
    """Ids by UTF-8 piece; pieces it does not have are counted and get the id of [UNK]."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__((piece.encode(), index) for index, piece in enumerate(tokenizer.pieces))
        self.unk_id = tokenizer.unk_id
        self.unknown = 0
        self.examples: list[str] = []

    def __missing__(self, piece: bytes) -> int:
        self.unknown += 1
        if len(self.examples) < 3:
            example = piece[:60].decode(errors="replace")
            if example not in self.examples:
                self.examples.append(example)
        return self.unk_id


class _LineReader:
    """Reads a prepared text in blocks of whole lines and turns them into ids."""

    def __init__(self, text: Path, file: BinaryIO, tokenizer: Tokenizer):
        self.text = text
        self.file = file
        self.tokenizer = tokenizer
        self.ids = _PieceIds(tokenizer)
        self.sha256 = hashlib.sha256()
        self.line_number = 0
        self.longest = 0
        self.longest_line = 0

    def read(self) -> bytes:
        """The next lines; nothing at the end of the file."""
        block = self.file.read(BLOCK_BYTES)
        if block and not block.endswith(b"\n"):
            rest = self.file.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                raise DataError(f"{self.text} has a line of more than 16 MB, so it is not prepared text.")
            block += rest
        self.sha256.update(block)
        return block

    def parse(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all lines of a block, int32 [tokens], and after how many of them each line ends, int64 [lines]."""
        ids = array("i")
        ends = []
        id_of = self.ids.__getitem__
        for line in block.removesuffix(b"\n").split(b"\n"):
            self.line_number += 1
            line = line.removesuffix(b"\r").strip(b" ")
            if not line:
                continue
            pieces = line.split(b" ")
            if b"  " in line:
                pieces = [piece for piece in pieces if piece]
            ids.extend(map(id_of, pieces))
            ends.append(len(ids))
            if len(pieces) > self.longest:
                self.longest, self.longest_line = len(pieces), self.line_number
        return np.frombuffer(ids, np.int32), np.array(ends, np.int64)

    def refuse_foreign_text(self, num_tokens: int) -> None:
        """Raise VocabularyError if more than 1 % of the pieces are not in the vocabulary."""
        share = self.ids.unknown / num_tokens
        if share > MAX_UNKNOWN_SHARE:
            raise VocabularyError(
                f"{share:.2%} of the pieces in {self.text} are not in the vocabulary {self.tokenizer.path} "
                f"(for example {', '.join(self.ids.examples)}): pass the --vocab_path the text was prepared with, "
                "or prepare the text again with this vocabulary."
            )
