"""Writing of raw text as lines of SentencePiece pieces.

Pieces are separated by single spaces. Every line of the input is encoded separately. The pieces of all lines
are concatenated, then split into lines of exactly `max_seq_length - 2` pieces regardless of where the input's
lines or documents end. Only the last line may be shorter.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from DeBERTa.data.encode import EncodedText, Encoder, Recipe, encode_blocks
from DeBERTa.data.sources import STDIN, SourceFile, hash_states, name_sources, read_files
from DeBERTa.data.token_store import StoreMeta, find_store, get_store_path, write_store
from DeBERTa.errors import DataError, VocabularyError
from DeBERTa.files import commit, get_state, open_partial

WARN_UNKNOWN, MAX_UNKNOWN = 0.05, 0.2  # shares of [UNK]
READER = 2  # raised when the same files are read as other text, so that they are prepared again
MIN_SEQ_LENGTH = 3  # [CLS], one piece, [SEP]

logger = logging.getLogger(__name__)


@dataclass
class PreparedText:
    """An output with the metadata of its token ids, and the seconds it took.

    `seconds` is None if the output was up to date.
    """

    output: Path
    meta: StoreMeta
    seconds: float | None


def count_usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_outputs(
    sources: Sequence[Path],
    outputs: Sequence[Path],
    recipe: Recipe,
    max_seq_length: int = 512,
    workers: int | None = None,
    is_part: bool = False,
) -> list[PreparedText]:
    """Write the outputs and their token ids, one after the other, if needed.

    Args:
        outputs: a file, and one for each of `recipe.ranges`.
        max_seq_length: at least `MIN_SEQ_LENGTH`.
        workers: processes that encode, by default one per core; with 1, this process encodes.
        is_part: whether the outputs are parts of larger ones, which may be empty.

    Raises `DataError`, `VocabularyError` or `StorageError`; every output is then as before, or complete.
    """
    outputs = [_check_paths(sources, output, recipe.vocabulary) for output in outputs]
    files, encoder = [SourceFile(source) for source in sources], Encoder(recipe)
    origin = _describe_origin(sources, recipe, max_seq_length)
    prepared = _find_prepared(outputs, origin, encoder)
    if prepared:
        return prepared
    start, input_bytes = time.perf_counter(), 0
    label, total = f"preparing {outputs[0].name}", sum(file.bytes_on_disk for file in files)
    with contextlib.ExitStack() as stack:
        writers = [_Writer(stack, output, encoder, max_seq_length) for output in outputs]
        prepared = _find_prepared(outputs, origin, encoder)  # by the process that held the locks
        if prepared:
            return prepared
        bar = stack.enter_context(tqdm(desc=label, total=total, unit="B", unit_scale=True))
        blocks = read_files(files, recipe.reading, bar)
        encoded = encode_blocks(blocks, encoder, workers or count_usable_cores())
        with contextlib.closing(encoded):  # ends the processes if writing fails
            for block in encoded:
                input_bytes += block.input_bytes
                for writer, text in zip(writers, block.texts, strict=True):
                    writer.write(text)
        _check_outputs(writers, sources, recipe.vocabulary, is_part)
        prepared = _find_prepared(outputs, origin, encoder)  # without file locks, by another node meanwhile
        if prepared:
            return prepared
        for writer in writers:
            writer.commit(origin | {"input_bytes": input_bytes})
    seconds = time.perf_counter() - start
    return [PreparedText(writer.output, writer.meta, seconds) for writer in writers]


def is_prepared(text: Path) -> bool:
    """Return whether a file is an output, not changed since."""
    store = find_store(text)
    return store is not None and store.meta.recipe is not None


def _check_paths(sources: Sequence[Path], output: Path, vocabulary: Path) -> Path:
    """Return `output` with symbolic links resolved, so that links to it remain.

    Raises `DataError` if the output is also an input, or is not a regular file.
    """
    if output.exists():
        for path, name in (*((source, "input") for source in sources), (vocabulary, "vocabulary")):
            if path.exists() and output.samefile(path):
                raise DataError(f"cannot write {output}: it is also the {name}; give another --output")
        if not output.is_file():
            raise DataError(f"cannot write {output}: it is a directory or a device; give a file name")
    return output.resolve()


def _describe_origin(sources: Sequence[Path], recipe: Recipe, max_seq_length: int) -> dict[str, Any]:
    """Return what tells whether an output is up to date."""
    return {
        "reader": READER,
        "inputs_sha256": hash_states(sources),
        "has_stdin": STDIN in sources,
        "max_seq_length": max_seq_length,
        "errors": recipe.reading.errors,
        "column": recipe.reading.column,
        "has_documents": recipe.reading.has_documents,
        "ranges": [list(each) for each in recipe.ranges],
        "vocabulary_path": str(recipe.vocabulary.resolve()),
    }


def _find_prepared(outputs: Sequence[Path], origin: dict[str, Any], encoder: Encoder) -> list[PreparedText]:
    """Return the outputs if all of them are up to date, else nothing."""
    prepared: list[PreparedText] = []
    wanted = {name: value for name, value in origin.items() if name != "vocabulary_path"}
    for output in outputs:
        store = find_store(output, encoder.tokenizer.fingerprint) if output.is_file() else None
        if origin["has_stdin"] or store is None or not wanted.items() <= (store.meta.recipe or {}).items():
            return []
        prepared.append(PreparedText(output, store.meta, None))
    return prepared


class _Writer:
    """Writes one output: its pieces in lines of equal length, and its token ids.

    `stack` closes it; an output that is not committed then is as before.
    """

    def __init__(
        self, stack: contextlib.ExitStack, output: Path, encoder: Encoder, max_seq_length: int
    ) -> None:
        self._file = stack.enter_context(open_partial(output))
        self._store = stack.enter_context(write_store(get_store_path(output)))
        self.output, self.meta, self.unknown = output, self._store.meta, 0
        self._encoder, self._width = encoder, max_seq_length - 2
        self._digest = hashlib.sha256()

    def write(self, text: EncodedText) -> None:
        """Append text."""
        ids, start, width = text.ids, self.meta.num_tokens, self._width
        if len(ids) == 0:
            return
        line_starts = np.arange(-start % width, len(ids), width)
        piece_bytes = self._encoder.piece_bytes[ids]
        buffer = np.frombuffer(bytearray(text.pieces), np.uint8)
        buffer[(np.cumsum(piece_bytes) - piece_bytes)[line_starts]] = ord("\n")
        self._write(buffer.data[1:] if start == 0 else buffer.data)
        self._store.append(ids, np.arange(start // width + 1, (start + len(ids)) // width + 1) * width)
        self.unknown += int(np.count_nonzero(ids == self._encoder.tokenizer.unk_id))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def commit(self, origin: dict[str, Any]) -> None:
        """Complete text and ids, and replace older ones."""
        meta, width = self.meta, self._width
        if meta.num_tokens:
            self._write(b"\n")
        if meta.num_tokens % width:
            self._store.append(np.empty(0, np.int32), np.array([meta.num_tokens]))
        meta.text_sha256 = self._digest.hexdigest()
        meta.vocabulary_sha256 = self._encoder.tokenizer.fingerprint
        meta.longest, meta.longest_line = min(meta.num_tokens, width), 1
        commit(self._file, self.output)
        meta.text, meta.recipe = get_state(self.output.stat()), origin
        self._store.commit()


def _check_outputs(
    writers: Sequence[_Writer], sources: Sequence[Path], vocabulary: Path, is_part: bool
) -> None:
    """Check that there is text, and the share of [UNK].

    Warns above 5 %. Raises `VocabularyError` above 20 % of at least 1,000 tokens, and `DataError` if an
    output has no text.
    """
    name = name_sources(sources)
    tokens = sum(writer.meta.num_tokens for writer in writers)
    unknown = sum(writer.unknown for writer in writers)
    empty = " or ".join(writer.output.name for writer in writers if writer.meta.num_tokens == 0)
    if tokens == 0 and not is_part:
        raise DataError(f"{name} has no text: it is empty or blank; give another --input")
    if empty and not is_part:
        what = f"no document of {name} is for {empty}"
        raise DataError(f"{what}: there are too few; give more documents or larger fractions")
    message = f"{vocabulary} does not fit {name}: {unknown / max(tokens, 1):.1%} of the pieces are [UNK]"
    advice = "train a vocabulary on the text with --train_vocab"
    if tokens >= 1000 and unknown > MAX_UNKNOWN * tokens:
        raise VocabularyError(f"{message}; {advice}")
    if unknown > WARN_UNKNOWN * tokens:
        logger.warning("%s; %s", message, advice)
