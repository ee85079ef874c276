"""Token ids of one prepared text in a file, memory-mapped and verified.

The store of `train.txt` is `train.txt.ids`, a cache:

    tokens     int32 [num_tokens], the ids of all lines; padded to a multiple of 8 bytes
    offsets    int64 [lines + 1], where each line begins in `tokens`, and the end of the last one
    checksums  uint32 [blocks], the CRC-32 of every `BLOCK_TOKENS` ids
    metadata   the fields of `StoreMeta` as JSON
    trailer    SHA-256 of offsets, checksums and metadata, and the length of the JSON, 8 bytes, little endian

It is written to the cache directory if it cannot be written next to the text.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from DeBERTa.data.files import commit, get_cache_dir, get_state, open_partial
from DeBERTa.errors import DamagedStoreError

FORMAT = 3
BLOCK_TOKENS = 16 << 10
VERIFIED_AT_OPEN = 65536  # blocks, 4 GB, verified when a store is opened; the others are on first use
TRAILER_BYTES = 32 + 8


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
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[-8:].tobytes(), "little")
        arrays = data[: -TRAILER_BYTES - length]
        encoded = data[-TRAILER_BYTES - length : -TRAILER_BYTES].tobytes()
        self.meta = StoreMeta(**json.loads(encoded))
        blocks = _count_blocks(self.meta.num_tokens)
        ends = np.cumsum([-(-self.meta.num_tokens // 2) * 8, 8 * (self.meta.lines + 1), 4 * blocks])
        if ends[-1] != len(arrays):
            raise ValueError("the arrays do not fill the file")
        digest = hashlib.sha256(arrays[ends[0] :].data)
        self.fingerprint = digest.hexdigest()
        digest.update(encoded)
        if digest.digest() != data[-TRAILER_BYTES:-8].tobytes():
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
        start, end = self.offsets[line : line + 2]
        if not all(map(self._verify, range(start // BLOCK_TOKENS, _count_blocks(int(end))))):
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            raise DamagedStoreError(
                f"{self.path} is damaged: its token ids were changed; the same command builds it again"
            )
        return self.tokens[start:end]

    def has_valid_ids(self) -> bool:
        """Return whether the ids are those that were written, up to `VERIFIED_AT_OPEN` blocks."""
        return all(map(self._verify, range(min(len(self._checksums), VERIFIED_AT_OPEN))))

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


def get_cached_store_path(text: Path) -> Path:
    """Return the path in the cache directory of the store of a file.

    It is used if the default path cannot be written.
    """
    name = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:32]
    return get_cache_dir() / "token-stores" / f"{name}.ids"


def find_store(text: Path, vocabulary_sha256: str | None = None) -> StoreFile | None:
    """Return the valid store that matches a file and a vocabulary, if there is one.

    With `vocabulary_sha256` None, the vocabulary is not compared.
    """
    for path in (get_store_path(text), get_cached_store_path(text)):
        # Missing or damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, OverflowError, RecursionError):
            store = StoreFile(path)
            is_fitting = vocabulary_sha256 in (None, store.meta.vocabulary_sha256)
            if is_fitting and store.meta.text == get_state(text.stat()) and store.has_valid_ids():
                return store
    return None


class TokenStoreWriter:
    """Writes a store: `append` the ids in order, complete `meta`, then `commit`."""

    def __init__(self, path: Path, tokens: BinaryIO, offsets: BinaryIO) -> None:
        self.meta = StoreMeta()
        self._path, self._tokens, self._offsets = path, tokens, offsets
        self._offsets.write(bytes(8))
        self._checksums: list[int] = []
        self._checksum = 0  # of the last block, as far as it is written

    def append(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Append ids, int32 [n], and the lines that they complete.

        `ends`: int64, ascending; for each of these lines the number of tokens in the store up to its end.
        """
        ids = np.ascontiguousarray(ids, np.int32)
        self._tokens.write(ids.data)
        self._offsets.write(np.ascontiguousarray(ends, np.int64).data)
        done = 0
        while done < len(ids):
            part = ids[done : done + BLOCK_TOKENS - (self.meta.num_tokens + done) % BLOCK_TOKENS]
            self._checksum = zlib.crc32(part.data, self._checksum)
            done += len(part)
            if (self.meta.num_tokens + done) % BLOCK_TOKENS == 0:
                self._checksums.append(self._checksum)
                self._checksum = 0
        self.meta.num_tokens += len(ids)
        self.meta.lines += len(ends)

    def commit(self) -> None:
        """Complete the store and replace an older one."""
        if self.meta.num_tokens % BLOCK_TOKENS:
            self._checksums.append(self._checksum)
        self._tokens.write(bytes(-4 * self.meta.num_tokens % 8))
        digest = hashlib.sha256()
        self._offsets.seek(0)
        while chunk := self._offsets.read(1 << 20):
            digest.update(chunk)
            self._tokens.write(chunk)
        encoded = json.dumps(asdict(self.meta)).encode()
        for data in (np.array(self._checksums, np.uint32).tobytes(), encoded):
            digest.update(data)
            self._tokens.write(data)
        self._tokens.write(digest.digest() + len(encoded).to_bytes(8, "little"))
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
