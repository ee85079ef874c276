"""Token ids of a prepared text, from its store or else looked up in the text.

A prepared text `train.txt` holds one sequence per line, as pieces separated by single spaces. It may also be
a directory of such files, its parts: they are one text, in the order of their names. The ids of each file are
stored next to it (`store_file.py`). A store that is damaged, or that does not match its text and vocabulary,
is written again from the text.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.files import get_state, raise_data_errors
from DeBERTa.data.store_file import (
    StoreFile,
    StoreMeta,
    find_store,
    get_cached_store_path,
    get_store_path,
    write_store,
)
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, StorageError, VocabularyError

MAX_LINE_BYTES = 16 << 20  # no sequence is that long
MAX_UNKNOWN_SHARE = 0.01
PART = re.compile(r"(\d+)-of-(\d+)\.txt")  # the name of a part that prepare_data.py --shard wrote

logger = logging.getLogger(__name__)


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
        """Return how often each id occurs among the first `max_tokens` tokens, int64 [num_ids]."""
        counts = np.zeros(num_ids, np.int64)
        for file in self.files:
            tokens = file.tokens[:max_tokens]
            counts += np.bincount(tokens, minlength=num_ids)
            max_tokens -= len(tokens)
        return counts


def _hash_all(hashes: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def list_parts(text: Path) -> list[Path]:
    """Return the files of a prepared text: itself, or its parts in order if it is a directory.

    Raises `DataError` if the text or one of its parts is missing.
    """
    if text.is_file():
        return [text]
    parts = sorted(part for part in text.glob("*.txt") if part.is_file())
    if not parts:
        raise DataError(f"no prepared text {text}: the file does not exist; write it with prepare_data.py")
    names = [match for part in parts if (match := PART.fullmatch(part.name))]
    if names:
        count = int(names[0][2])
        missing = sorted({get_part_name(number, count) for number in range(count)} - {p.name for p in parts})
        if missing or len(names) < len(parts) or len(parts) != count:
            what = f"{', '.join(missing)} missing" if missing else "it has parts of several preparations"
            raise DataError(f"{text} is not complete: {what}; prepare every part with the same --shard I/N")
    return parts


def get_part_name(number: int, count: int) -> str:
    """Return the file name of part `number`, from 0, of `count`."""
    return f"{number:05}-of-{count:05}.txt"


def open_store(text: Path, tokenizer: Tokenizer, max_tokens: int, progress: bool = True) -> TokenStore:
    """Open the token ids of a prepared text; look them up first where no store matches.

    `text`: a file, or a directory of files. `progress` shows a progress bar, and a warning about unknown
    pieces. Raises `DataError` if the text is missing or empty or has a line of more than `max_tokens` pieces,
    `VocabularyError` if it was prepared with another vocabulary or more than 1 % of its pieces are unknown,
    `StorageError` if the store cannot be written.
    """
    store = TokenStore([_open_file(part, tokenizer, max_tokens, progress) for part in list_parts(Path(text))])
    if len(store) == 0:
        raise DataError(f"{text} has no lines of tokens: it is empty; prepare it again")
    return store


def _open_file(text: Path, tokenizer: Tokenizer, max_tokens: int, progress: bool) -> StoreFile:
    store = find_store(text, tokenizer.fingerprint)
    if store is None:
        store = _build(text, tokenizer, progress)
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


def _build(text: Path, tokenizer: Tokenizer, progress: bool) -> StoreFile:
    """Write the store of a text and open it.

    Raises `DataError` if the text changed in the meantime.
    """
    path = get_store_path(text)
    try:
        _write_from_text(path, text, tokenizer, progress)
    except StorageError as error:
        cached = get_cached_store_path(text)
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
    with raise_data_errors(text), text.open("rb") as file, write_store(path) as writer:
        if (
            find_store(text, tokenizer.fingerprint) is not None
        ):  # written while this process waited for the lock
            return
        _refuse_other_vocabulary(text, tokenizer)
        if path.exists():
            logger.info("%s is damaged, or not of this text and vocabulary: writing it again", path)
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
        if meta.unknown > MAX_UNKNOWN_SHARE * meta.num_tokens:
            raise VocabularyError(
                f"{text} does not fit the vocabulary {tokenizer.path}: "
                f"{meta.unknown / meta.num_tokens:.2%} of its pieces are not in it, for example "
                f"{', '.join(lookup.examples)}; pass the --vocab_path of the text, or prepare it again"
            )
        writer.commit()


def _read_lines(text: Path, file: BinaryIO, progress: bool) -> Iterator[bytes]:
    """Yield the lines of a text, with a progress bar."""
    size = os.fstat(file.fileno()).st_size
    with (
        raise_data_errors(text),
        tqdm(desc=f"reading {text.name}", total=size, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{text} is not prepared text: it has a line of over 16 MB; prepare it")
            bar.update(len(line))
            yield line


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
