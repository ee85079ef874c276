"""Token ids of a prepared text, memory-mapped and verified.

A prepared text `train.txt` holds one sequence per line, as pieces separated by single spaces. It may also be
a directory of such files, its parts: they are one text, in the order of their names. The store of a file is
`train.txt.ids`, a cache:

    tokens     int32 [num_tokens], the ids of all lines; padded to a multiple of 8 bytes
    offsets    int64 [lines + 1], where each line begins in `tokens`, and the end of the last one
    checksums  uint32 [blocks], the CRC-32 of every `BLOCK_TOKENS` ids
    metadata   the fields of `StoreMeta` as JSON
    trailer    SHA-256 of offsets, checksums and metadata, and the length of the JSON, 8 bytes, little endian

A store that is damaged, or that does not match its text and vocabulary, is written again from the text. It is
written to the cache directory if it cannot be written next to the text.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.text import refuse_binary
from DeBERTa.data.tokenizer import SPECIAL_PIECES, Tokenizer
from DeBERTa.errors import DamagedStoreError, DataError, StorageError, VocabularyError
from DeBERTa.files import (
    commit,
    get_cache_dir,
    get_state,
    open_partial,
    open_regular,
    raise_data_errors,
    raise_storage_errors,
    read_chunks,
)

FORMAT = 3
BLOCK_TOKENS = 16 << 10
VERIFIED_AT_OPEN = 65536  # blocks, 4 GB, verified when a text is opened; the others are on first use
TRAILER_BYTES = 32 + 8
FORMAT_1 = {"meta.json", "tokens.int32", "offsets.int64"}  # a directory of these files
MAX_LINE_BYTES = 16 << 20  # no sequence is that long
MAX_UNKNOWN_SHARE = 0.01
PART = re.compile(r"\d+-of-(\d+)\.txt")  # the name of a part that prepare_data.py --shard wrote

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

    def is_valid(self) -> bool:
        """Return whether the format is the present one, and all values are possible.

        Types are checked, too.
        """
        values, defaults = asdict(self), asdict(StoreMeta(recipe=self.recipe))
        is_typed = all(type(value) is type(defaults[name]) for name, value in values.items())
        is_counted = all(value >= 0 for value in values.values() if isinstance(value, int))
        is_counted &= max(self.lines, self.longest, self.unknown) <= self.num_tokens
        is_counted &= self.longest_line <= 1 + self.text.get("bytes", 0)
        return self.format == FORMAT and is_typed and is_counted and isinstance(self.recipe, dict | None)


class StoreFile:
    """The store of one file.

    Attributes:
        tokens: memory-mapped int32 [num_tokens].
        offsets: memory-mapped int64 [lines + 1].
        fingerprint: SHA-256 of offsets and checksums. Equal ids in equal lines have the same.

    Raises `ValueError`, `TypeError` or `OSError` if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb", opener=open_regular) as file:
            data = np.memmap(file, np.uint8, "r")
        length = int.from_bytes(data[-8:].tobytes(), "little")
        arrays = data[: -TRAILER_BYTES - length]
        encoded = data[-TRAILER_BYTES - length : -TRAILER_BYTES].tobytes()
        self.meta = StoreMeta(**json.loads(encoded))
        if not self.meta.is_valid():
            raise ValueError("another format, or metadata of other types")
        blocks = _count_blocks(self.meta.num_tokens)
        ends = np.cumsum([-(-self.meta.num_tokens // 2) * 8, 8 * (self.meta.lines + 1), 4 * blocks])
        digest = hashlib.sha256(arrays[ends[0] :].data)
        self.fingerprint = digest.hexdigest()
        digest.update(encoded)
        if ends[-1] != len(arrays) or digest.digest() != data[-TRAILER_BYTES:-8].tobytes():
            raise ValueError("line ends, checksums or metadata were changed")
        self.tokens = arrays[: 4 * self.meta.num_tokens].view(np.int32)
        self.offsets = arrays[ends[0] : ends[1]].view(np.int64)
        self._checksums = arrays[ends[1] :].view(np.uint32)
        self._is_verified = np.zeros(blocks, bool)

    def __len__(self) -> int:
        """Return the number of lines."""
        return self.meta.lines

    def __getitem__(self, line: int) -> np.ndarray:
        """Return the ids of a line, int32 [tokens of the line], without special tokens.

        Raises `DamagedStoreError`, and removes the store, if the ids are not those that were written.
        """
        start, end = map(int, self.offsets[line : line + 2])
        is_line = 0 <= start <= end <= min(start + self.meta.longest, self.meta.num_tokens)
        blocks = range(start // BLOCK_TOKENS, _count_blocks(end)) if is_line else range(0)
        if not (is_line and all(map(self._verify, blocks))):
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            raise DamagedStoreError(
                f"{self.path} is damaged: its token ids were changed; the same command builds it again"
            )
        return self.tokens[start:end]

    def has_valid_ids(self, num_blocks: int) -> bool:
        """Return whether the first blocks of ids are those written."""
        return all(map(self._verify, range(min(len(self._checksums), num_blocks))))

    def _verify(self, block: int) -> bool:
        """Return whether a block of ids has its checksum."""
        if not self._is_verified[block]:
            ids = self.tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
            self._is_verified[block] = zlib.crc32(ids.data) == self._checksums[block]
        return bool(self._is_verified[block])


def _count_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def get_store_path(text: Path) -> Path:
    """Return the default path of the store of a file."""
    return text.with_name(text.name + ".ids")


def _get_cached_path(text: Path) -> Path:
    """Return the path of the store of a file in the cache directory."""
    name = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:32]
    return get_cache_dir() / "token-stores" / f"{name}.ids"


def find_store(
    text: Path, vocabulary_sha256: str | None = None, verified_blocks: int | None = None
) -> StoreFile | None:
    """Return the valid store that matches a file and a vocabulary, if there is one.

    With `vocabulary_sha256` None, the vocabulary is not compared. `verified_blocks`: how many blocks of ids
    are verified at most, by default `VERIFIED_AT_OPEN`.
    """
    limit = VERIFIED_AT_OPEN if verified_blocks is None else verified_blocks
    for path in (get_store_path(text), _get_cached_path(text)):
        # Missing or damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, OverflowError, RecursionError):
            store = StoreFile(path)
            is_fitting = vocabulary_sha256 in (None, store.meta.vocabulary_sha256)
            if is_fitting and store.meta.text == get_state(text.stat()) and store.has_valid_ids(limit):
                return store
    return None


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
        checksums = [zlib.crc32(ids) for ids in read_chunks(self._tokens, 4 * BLOCK_TOKENS)]
        encoded = json.dumps(asdict(self.meta)).encode()
        self._tokens.write(bytes(-4 * self.meta.num_tokens % 8))
        digest = hashlib.sha256()
        for data in chain(read_chunks(self._offsets), [np.array(checksums, np.uint32).tobytes(), encoded]):
            digest.update(data)
            self._tokens.write(data)
        self._tokens.write(digest.digest() + len(encoded).to_bytes(8, "little"))
        commit(self._tokens, self._path)


@contextlib.contextmanager
def write_store(path: Path) -> Iterator[TokenStoreWriter]:
    """Open a writer for a store.

    A store that is not committed is removed. Raises `StorageError` if it cannot be written.
    """
    with raise_storage_errors(path):
        if path.is_dir():
            if others := sorted({file.name for file in path.iterdir()} - FORMAT_1):
                reason = f"it is a directory with other files ({', '.join(others[:3])})"
                raise FileExistsError(errno.EEXIST, reason, str(path))
            shutil.rmtree(path)
        elif path.is_fifo():
            path.unlink()
    with open_partial(path) as tokens, tempfile.TemporaryFile(dir=path.parent) as offsets:
        yield TokenStoreWriter(path, tokens, offsets)


class TokenStore:
    """The lines of a prepared text: those of its files, one after the other.

    Attributes:
        meta: the counts of all files; with several, the hash of their hashes.
        fingerprint: SHA-256 of all ids and line ends, in hexadecimal.
    """

    def __init__(self, files: list[StoreFile]) -> None:
        self.files = files
        self._starts = np.cumsum([0, *map(len, files)])
        self.meta, self.fingerprint = files[0].meta, files[0].fingerprint
        if len(files) > 1:
            metas = [file.meta for file in files]
            self.meta = StoreMeta(
                text_sha256=_hash_all(meta.text_sha256 for meta in metas),
                vocabulary_sha256=self.meta.vocabulary_sha256,
                lines=len(self),
                num_tokens=sum(meta.num_tokens for meta in metas),
                unknown=sum(meta.unknown for meta in metas),
            )
            self.fingerprint = _hash_all(file.fingerprint for file in files)

    def __len__(self) -> int:
        """Return the number of lines."""
        return int(self._starts[-1])

    def __getitem__(self, line: int) -> np.ndarray:
        """Return the ids of a line, int32 [tokens of the line], without special tokens."""
        file = int(np.searchsorted(self._starts, line, side="right")) - 1
        return self.files[file][line - int(self._starts[file])]

    def count_ids(self, num_ids: int, max_tokens: int = 10_000_000) -> np.ndarray:
        """Count each id among the first `max_tokens` tokens, int64 [num_ids]."""
        counts = np.zeros(num_ids, np.int64)
        for file in self.files:
            tokens = file.tokens[:max_tokens]
            counts += np.bincount(tokens, minlength=num_ids)
            max_tokens -= len(tokens)
        return counts


def _hash_all(hashes: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def list_parts(text: Path) -> list[Path]:
    """Return the files of a prepared text: itself, or the parts of a directory.

    Parts are in order. Raises `DataError` if the text or one of its parts is missing.
    """
    if text.is_file():
        return [text]
    parts = sorted(part for part in text.glob("*.txt") if part.is_file())
    if not parts and text.exists():
        raise DataError(f"no prepared text {text}: it is neither a file nor a directory of parts; remove it")
    if not parts:
        raise DataError(f"no prepared text {text}: the file does not exist; write it with prepare_data.py")
    names = {part.name for part in parts}
    match = next(filter(None, map(PART.fullmatch, sorted(names))), None)
    expected = {get_part_name(number, int(match[1])) for number in range(int(match[1]))} if match else names
    if names != expected:
        missing = ", ".join(sorted(expected - names))
        what = f"{missing} missing" if missing else "it has parts of several preparations"
        raise DataError(f"{text} is not complete: {what}; prepare every part with the same --shard I/N")
    return parts


def get_part_name(number: int, count: int) -> str:
    """Return the file name of part `number`, from 0, of `count`."""
    return f"{number:05}-of-{count:05}.txt"


def open_store(text: Path, tokenizer: Tokenizer, max_tokens: int, has_progress: bool = True) -> TokenStore:
    """Open the token ids of a prepared text; look them up if no store matches.

    `text`: a file, or a directory of files. `has_progress` shows a progress bar, and a warning about unknown
    pieces. Raises `DataError` if the text is missing or empty or has a line of more than `max_tokens` pieces,
    `VocabularyError` if it was prepared with another vocabulary or more than 1 % of its pieces are unknown,
    `StorageError` if the store cannot be written.
    """
    files: list[StoreFile] = []
    for part in list_parts(Path(text)):
        verified_blocks = max(
            VERIFIED_AT_OPEN - sum(_count_blocks(file.meta.num_tokens) for file in files), 0
        )
        files.append(_open_file(part, tokenizer, max_tokens, has_progress, verified_blocks))
    store = TokenStore(files)
    if len(store) == 0:
        raise DataError(f"{text} has no lines of tokens: it is empty; prepare it again")
    return store


def _open_file(
    text: Path, tokenizer: Tokenizer, max_tokens: int, has_progress: bool, verified_blocks: int
) -> StoreFile:
    store = find_store(text, tokenizer.fingerprint, verified_blocks)
    if store is None:
        try:
            _write_from_text(get_store_path(text), text, tokenizer, has_progress)
        except StorageError as error:
            cached = _get_cached_path(text)
            logger.info("token ids go to %s (%s)", cached.parent, error)
            _write_from_text(cached, text, tokenizer, has_progress)
        store = find_store(text, tokenizer.fingerprint)
    if store is None:
        raise DataError(f"{text} changed while it was read: it may be incomplete; start when it is complete")
    meta = store.meta
    if meta.longest > max_tokens:
        raise DataError(
            f"{text}, line {meta.longest_line}: {meta.longest} tokens, but --max_seq_length {max_tokens + 2} "
            f"allows {max_tokens} between [CLS] and [SEP]; prepare the text for this length, or raise it"
        )
    if meta.unknown and has_progress:
        unknown = f"{meta.unknown} of {meta.num_tokens} pieces in {text}"
        logger.warning("%s are not in the vocabulary %s and become [UNK]", unknown, tokenizer.path)
    return store


def _write_from_text(path: Path, text: Path, tokenizer: Tokenizer, has_progress: bool) -> None:
    """Write the ids of all lines of a text, unless another process has done so."""
    lookup, digest = _PieceLookup(tokenizer), hashlib.sha256()
    with raise_data_errors(text), text.open("rb") as file, write_store(path) as writer:
        if find_store(text, tokenizer.fingerprint) is not None:  # by the process that held the lock
            return
        store = find_store(text)
        # Two vocabularies can share nearly all pieces, so that the text alone does not show it.
        if store is not None and store.meta.recipe is not None:
            raise VocabularyError(
                f"cannot read {text} with the vocabulary {tokenizer.path}: it was prepared with "
                f"{store.meta.recipe.get('vocabulary_path', 'another')}; pass that as --vocab_path, prepare "
                f"the text again, or remove {store.path} to look up its pieces in the other vocabulary"
            )
        if path.exists():
            logger.info("%s is damaged, or not of this text and vocabulary: writing it again", path)
        meta = writer.meta
        meta.text, meta.vocabulary_sha256 = get_state(os.fstat(file.fileno())), tokenizer.fingerprint
        refuse_binary(text, file.peek())
        for number, line in enumerate(_read_lines(text, file, has_progress), 1):
            digest.update(line)
            pieces = filter(None, line.rstrip(b"\r\n").split(b" "))
            ids = np.fromiter(map(lookup.__getitem__, pieces), np.int32)
            if len(ids):
                writer.append(ids, np.array([meta.num_tokens + len(ids)]))
            if len(ids) > meta.longest:
                meta.longest, meta.longest_line = len(ids), number
        meta.text_sha256, meta.unknown = digest.hexdigest(), lookup.unknown
        if meta.unknown > MAX_UNKNOWN_SHARE * meta.num_tokens:
            raise VocabularyError(
                f"{text} does not fit the vocabulary {tokenizer.path}: "
                f"{meta.unknown / meta.num_tokens:.2%} of its pieces are not in it, or [PAD], for example "
                f"{', '.join(lookup.examples)}; pass the --vocab_path of the text, or prepare it again"
            )
        # Without file locks, another node may have been first.
        if find_store(text, tokenizer.fingerprint) is None:
            writer.commit()


def _read_lines(text: Path, file: BinaryIO, has_progress: bool) -> Iterator[bytes]:
    """Yield the lines of a text, with a progress bar."""
    size, label = os.fstat(file.fileno()).st_size, f"reading {text.name}"
    bar = tqdm(desc=label, total=size, unit="B", unit_scale=True, disable=not has_progress)
    with raise_data_errors(text), bar:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{text} is not prepared text: it has a line of over 16 MB; prepare it")
            bar.update(len(line))
            yield line


class _PieceLookup(dict[bytes, int]):
    """Ids by UTF-8 piece.

    Missing pieces, and [PAD], which is no text, are counted and get the id of [UNK].
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__((piece.encode(), index) for index, piece in enumerate(tokenizer.pieces))
        del self[SPECIAL_PIECES[tokenizer.pad_id].encode()]
        self.unk_id, self.unknown = tokenizer.unk_id, 0
        self.examples: list[str] = []

    def __missing__(self, piece: bytes) -> int:
        self.unknown += 1
        example = piece[:60].decode(errors="replace")
        if len(self.examples) < 3 and example not in self.examples:
            self.examples.append(example)
        return self.unk_id
