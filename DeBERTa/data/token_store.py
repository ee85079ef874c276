"""Token ids of a prepared text, memory-mapped from a file next to it.

A prepared text `train.txt` holds one sequence per line, as pieces separated by single spaces. Its store
`train.txt.ids` is a cache, one file:

    tokens     int32 [num_tokens], the ids of all lines; padded to a multiple of 8 bytes
    offsets    int64 [lines + 1], where each line begins in `tokens`, and the end of the last one
    metadata   the fields of `StoreMeta` as JSON, followed by the length of the JSON, 8 bytes, little endian

A store that does not match its text and vocabulary is rebuilt from the text. If it cannot be written next to
the text, it is written to the cache directory.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.files import commit, get_cache_dir, get_state, open_partial
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, StorageError, VocabularyError

FORMAT = 2
MAX_LINE_BYTES = 16 << 20  # no sequence is that long
MAX_UNKNOWN_SHARE = 0.01

logger = logging.getLogger(__name__)


@dataclass
class StoreMeta:
    """The sources of a store and its counts."""

    format: int = FORMAT
    text: dict[str, int] = field(default_factory=dict)  # the state of the file
    text_sha256: str = ""
    vocabulary_sha256: str = ""
    lines: int = 0
    num_tokens: int = 0
    longest: int = 0  # tokens in the longest line
    longest_line: int = 0  # its number in the text, from 1
    unknown: int = 0  # pieces that are not in the vocabulary, other than a literal [UNK]
    recipe: dict[str, Any] | None = None  # the inputs of `prepare`, if it wrote the text


@dataclass(frozen=True)
class TokenStore:
    """Memory-mapped ids: `tokens` int32 [num_tokens], `offsets` int64 [lines + 1]."""

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    meta: StoreMeta

    def __len__(self) -> int:
        """Return the number of lines."""
        return self.meta.lines

    def __getitem__(self, line: int) -> np.ndarray:
        """Return the ids of a line, int32 [tokens of the line], without special tokens."""
        return self.tokens[self.offsets[line] : self.offsets[line + 1]]


def open_store(text: Path, tokenizer: Tokenizer, max_tokens: int, progress: bool = True) -> TokenStore:
    """Open the store of a prepared text; build it first if none matches.

    `progress` shows a progress bar, and a warning about unknown pieces. Raises `DataError` if the text is
    missing or empty or has a line of more than `max_tokens` pieces, `VocabularyError` if it was prepared with
    another vocabulary or more than 1 % of its pieces are unknown, `StorageError` if the store cannot be
    written.
    """
    text = Path(text)
    if not text.is_file():
        raise DataError(f"no prepared text {text}: the file does not exist; write it with prepare_data.py")
    store = find_store(text, tokenizer.fingerprint) or _build(text, tokenizer, progress)
    meta = store.meta
    if meta.longest > max_tokens:
        raise DataError(
            f"{text}, line {meta.longest_line}: {meta.longest} tokens, but --max_seq_length {max_tokens + 2} "
            f"allows {max_tokens} between [CLS] and [SEP]; prepare the text for this length, or raise it"
        )
    if meta.unknown and progress:
        unknown = f"{meta.unknown} of {meta.num_tokens} pieces in {text}"
        logger.warning("%s are not in the vocabulary %s and become [UNK]", unknown, tokenizer.path)
    return store


def get_store_path(text: Path) -> Path:
    """Return the default path of the store of a text."""
    return text.with_name(text.name + ".ids")


def _get_cached_path(text: Path) -> Path:
    """Return the path in the cache directory of the store of a text.

    It is used if the default path cannot be written.
    """
    name = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:32]
    return get_cache_dir() / "token-stores" / f"{name}.ids"


def find_store(text: Path, vocabulary_sha256: str | None = None) -> TokenStore | None:
    """Return the store that matches a text and a vocabulary, if there is one.

    With `vocabulary_sha256` None, the vocabulary is not compared.
    """
    for path in (get_store_path(text), _get_cached_path(text)):
        with contextlib.suppress(OSError, ValueError, TypeError, OverflowError):  # missing, or not complete
            store = _map_store(path)
            is_fitting = vocabulary_sha256 in (None, store.meta.vocabulary_sha256)
            if is_fitting and store.meta.format == FORMAT and store.meta.text == get_state(text.stat()):
                return store
    return None


def _map_store(path: Path) -> TokenStore:
    """Memory-map a store."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(8), "little")
        file.seek(-8 - length, os.SEEK_END)
        meta = StoreMeta(**json.loads(file.read(length)))
        tokens = np.memmap(file, np.int32, "r", 0, (meta.num_tokens,))
        offsets = np.memmap(file, np.int64, "r", -(-tokens.nbytes // 8) * 8, (meta.lines + 1,))
        if offsets.offset + offsets.nbytes + length + 8 != file.seek(0, os.SEEK_END):
            raise ValueError("the arrays do not fill the file")
    return TokenStore(path, tokens, offsets, meta)


class TokenStoreWriter:
    """Writes a store: `append` the ids in order, complete `meta`, then `commit`."""

    def __init__(self, path: Path, tokens: BinaryIO, offsets: BinaryIO) -> None:
        self.meta = StoreMeta()
        self._path, self._tokens, self._offsets = path, tokens, offsets
        self._offsets.write(bytes(8))

    def append(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Append ids, int32 [n], and the lines that they complete.

        `ends`: int64, ascending; for each of these lines the number of tokens in the store up to its end.
        """
        self._tokens.write(np.ascontiguousarray(ids, np.int32).data)
        self._offsets.write(np.ascontiguousarray(ends, np.int64).data)
        self.meta.num_tokens += len(ids)
        self.meta.lines += len(ends)

    def commit(self) -> None:
        """Complete the store and replace an older one."""
        self._tokens.write(bytes(-4 * self.meta.num_tokens % 8))
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, self._tokens)
        encoded = json.dumps(asdict(self.meta)).encode()
        self._tokens.write(encoded + len(encoded).to_bytes(8, "little"))
        if self._path.is_dir():  # the store of format 1
            shutil.rmtree(self._path)
        commit(self._tokens, self._path)


@contextlib.contextmanager
def write_store(path: Path) -> Iterator[TokenStoreWriter]:
    """Open a writer for a store.

    A store that is not committed is removed. Raises `StorageError` if it cannot be written.
    """
    with open_partial(path) as tokens, tempfile.TemporaryFile(dir=path.parent) as offsets:
        yield TokenStoreWriter(path, tokens, offsets)


def _build(text: Path, tokenizer: Tokenizer, progress: bool) -> TokenStore:
    """Write the store of a text and open it.

    Raises `DataError` if the text changed in the meantime.
    """
    try:
        _write_from_text(get_store_path(text), text, tokenizer, progress)
    except StorageError as error:
        cached = _get_cached_path(text)
        logger.info("token ids go to %s (%s)", cached.parent, error)
        _write_from_text(cached, text, tokenizer, progress)
    store = find_store(text, tokenizer.fingerprint)
    if store is None:
        raise DataError(
            f"{text} changed while it was read: it may be incomplete; start again when it is complete"
        )
    return store


def _write_from_text(path: Path, text: Path, tokenizer: Tokenizer, progress: bool) -> None:
    """Write the ids of all lines of a text, unless another process has done so."""
    lookup, digest = _PieceLookup(tokenizer), hashlib.sha256()
    with _open_text(text) as file, write_store(path) as writer:
        if find_store(text, tokenizer.fingerprint):  # written while this process waited for the lock
            return
        _refuse_other_vocabulary(text, tokenizer)
        meta = writer.meta
        meta.text, meta.vocabulary_sha256 = get_state(os.fstat(file.fileno())), tokenizer.fingerprint
        for number, line in enumerate(_read_lines(text, file, progress), 1):
            digest.update(line)
            pieces = filter(None, line.rstrip(b"\r\n").split(b" "))
            ids = np.fromiter(map(lookup.__getitem__, pieces), np.int32)
            if len(ids):
                writer.append(ids, np.array([meta.num_tokens + len(ids)]))
            if len(ids) > meta.longest:
                meta.longest, meta.longest_line = len(ids), number
        meta.text_sha256, meta.unknown = digest.hexdigest(), lookup.unknown
        if meta.lines == 0:
            raise DataError(f"{text} has no lines of tokens: it is empty; prepare it again")
        if meta.unknown > MAX_UNKNOWN_SHARE * meta.num_tokens:
            raise VocabularyError(
                f"{text} does not fit the vocabulary {tokenizer.path}: "
                f"{meta.unknown / meta.num_tokens:.2%} of its pieces are not in it, for example "
                f"{', '.join(lookup.examples)}; pass the --vocab_path of the text, or prepare it again"
            )
        writer.commit()


def _open_text(text: Path) -> BinaryIO:
    try:
        return text.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {text}: {error.strerror}; check its permissions") from error


def _read_lines(text: Path, file: BinaryIO, progress: bool) -> Iterator[bytes]:
    """Yield the lines of a text, with a progress bar."""
    size = os.fstat(file.fileno()).st_size
    with tqdm(
        desc=f"reading {text.name}", total=size, unit="B", unit_scale=True, disable=not progress
    ) as bar:
        while line := _read_line(text, file):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{text} is not prepared text: it has a line of over 16 MB; prepare it")
            bar.update(len(line))
            yield line


def _read_line(text: Path, file: BinaryIO) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {text}: {error.strerror or error}; check its disk") from error


def _refuse_other_vocabulary(text: Path, tokenizer: Tokenizer) -> None:
    """Raise `VocabularyError` if `prepare` used another vocabulary.

    Two vocabularies can share nearly all pieces, so that the text alone does not show it.
    """
    store = find_store(text)
    if store is not None and store.meta.recipe is not None:
        raise VocabularyError(
            f"cannot read {text} with the vocabulary {tokenizer.path}: it was prepared with "
            f"{store.meta.recipe['vocabulary_path']}; pass that as --vocab_path, prepare the text again, or "
            f"remove {store.path} to look up its pieces in the other vocabulary"
        )


class _PieceLookup(dict[bytes, int]):
    """Ids by UTF-8 piece.

    Missing pieces are counted and get the id of [UNK].
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__((piece.encode(), index) for index, piece in enumerate(tokenizer.pieces))
        self.unk_id = tokenizer.unk_id
        self.unknown = 0
        self.examples: list[str] = []

    def __missing__(self, piece: bytes) -> int:
        self.unknown += 1
        example = piece[:60].decode(errors="replace")
        if len(self.examples) < 3 and example not in self.examples:
            self.examples.append(example)
        return self.unk_id
