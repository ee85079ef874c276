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
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.encode import EncodedBlock, EncodedText, Encoder, Recipe, encode_blocks
from DeBERTa.data.files import commit, get_state, open_partial
from DeBERTa.data.sources import STDIN, Reading, SourceFile, describe_sources
from DeBERTa.data.store_file import TokenStoreWriter, find_store, get_store_path, write_store
from DeBERTa.data.text import Block
from DeBERTa.errors import DataError, VocabularyError

WARN_UNKNOWN, MAX_UNKNOWN = 0.05, 0.2  # shares of [UNK]
MIN_SEQ_LENGTH = 3  # [CLS], one piece, [SEP]

logger = logging.getLogger(__name__)


@dataclass
class PreparedText:
    """Counts of the output, bytes of decompressed input, and the duration.

    `seconds` is None if the output was up to date.
    """

    output: Path
    lines: int
    num_tokens: int
    input_bytes: int
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
    """Write the outputs and their token ids from the texts, one after the other, if needed.

    Args:
        outputs: a file, and one for each of `recipe.ranges`.
        workers: processes that encode, by default one per core; with 1, this process encodes.
        is_part: whether the outputs are parts of larger ones, which may be empty.

    Raises `DataError`, `VocabularyError` or `StorageError`; every output is then as before, or complete.
    """
    outputs = [_check_paths(sources, output, recipe.vocabulary) for output in outputs]
    if max_seq_length < MIN_SEQ_LENGTH:
        raise DataError(
            f"--max_seq_length {max_seq_length} is too small: nothing fits between [CLS] and [SEP]; pass 512"
        )
    files, encoder = [SourceFile(source) for source in sources], Encoder(recipe)
    origin = _describe_origin(sources, recipe, max_seq_length)
    prepared = _find_prepared(outputs, origin, encoder)
    if prepared:
        return prepared
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_partial(output)) for output in outputs]
        # Another process may have written them while this one waited for the lock.
        prepared = _find_prepared(outputs, origin, encoder)
        if prepared:
            return prepared
        stores = [stack.enter_context(write_store(get_store_path(output))) for output in outputs]
        places = zip(outputs, opened, stores, strict=True)
        writers = [_Writer(output, file, store, encoder, max_seq_length) for output, file, store in places]
        blocks = encode_blocks(_read_files(files, recipe.reading), encoder, workers or count_usable_cores())
        # Closing ends the processes and the progress bar if writing fails.
        with contextlib.closing(_show_progress(blocks, files, f"preparing {outputs[0].name}")) as shown:
            input_bytes = _write_blocks(shown, writers)
        _check_outputs(writers, files, recipe.vocabulary, is_part)
        for writer in writers:
            writer.commit(origin | {"input_bytes": input_bytes})
    seconds = time.perf_counter() - start
    return [writer.describe(input_bytes, seconds) for writer in writers]


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
    reading = recipe.reading
    return {
        **describe_sources(sources),
        "has_stdin": STDIN in sources,
        "max_seq_length": max_seq_length,
        "errors": reading.errors,
        "column": reading.column,
        "has_documents": reading.has_documents,
        "ranges": [list(each) for each in recipe.ranges],
        "vocabulary_path": str(recipe.vocabulary.resolve()),
    }


def _find_prepared(outputs: Sequence[Path], origin: dict[str, Any], encoder: Encoder) -> list[PreparedText]:
    """Return the outputs if all of them are up to date, else nothing."""
    prepared: list[PreparedText] = []
    wanted = {name: value for name, value in origin.items() if name != "vocabulary_path"}
    for output in outputs:
        store = find_store(output, encoder.tokenizer.fingerprint) if output.is_file() else None
        if store is None or store.meta.recipe is None or not wanted.items() <= store.meta.recipe.items():
            return []
        meta = store.meta
        prepared.append(
            PreparedText(output, meta.lines, meta.num_tokens, store.meta.recipe["input_bytes"], None)
        )
    return [] if origin["has_stdin"] else prepared


def _read_files(files: Sequence[SourceFile], reading: Reading) -> Iterator[Block]:
    for file in files:
        yield from file.read_blocks(reading)


def _show_progress(
    blocks: Generator[EncodedBlock], files: Sequence[SourceFile], label: str
) -> Generator[EncodedBlock]:
    """Yield the blocks, with a progress bar over the bytes of the files."""
    total = sum(file.bytes_on_disk for file in files)
    current = read_before = 0  # the file that is being read, and the bytes of those before it
    with tqdm(desc=label, total=total, unit="B", unit_scale=True) as bar, contextlib.closing(blocks):
        for block in blocks:
            yield block
            while current < len(files) - 1 and files[current].position == files[current].bytes_on_disk:
                read_before += files[current].bytes_on_disk
                current += 1
            bar.update(read_before + files[current].position - bar.n)


def _write_blocks(blocks: Iterator[EncodedBlock], writers: Sequence["_Writer"]) -> int:
    """Write the blocks; return the number of bytes of input."""
    input_bytes = 0
    for block in blocks:
        input_bytes += block.input_bytes
        for writer, text in zip(writers, block.texts, strict=True):
            writer.write(text)
    return input_bytes


class _Writer:
    """Writes one output: its pieces in lines of equal length, and its token ids."""

    def __init__(
        self, output: Path, file: BinaryIO, store: TokenStoreWriter, encoder: Encoder, max_seq_length: int
    ) -> None:
        self.output, self.meta, self.unknown = output, store.meta, 0
        self._file, self._store, self._encoder = file, store, encoder
        self._width = max_seq_length - 2
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

    def describe(self, input_bytes: int, seconds: float) -> PreparedText:
        """Return the counts."""
        return PreparedText(self.output, self.meta.lines, self.meta.num_tokens, input_bytes, seconds)


def _check_outputs(
    writers: Sequence[_Writer], files: Sequence[SourceFile], vocabulary: Path, is_part: bool
) -> None:
    """Check that there is text, and the share of [UNK]: warn above 5 %, raise above 20 %.

    Raises `VocabularyError` above 20 % of at least 1,000 tokens, and `DataError` if an output has no text.
    """
    name = f"{files[0].path}" if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    tokens = sum(writer.meta.num_tokens for writer in writers)
    unknown = sum(writer.unknown for writer in writers)
    if tokens == 0 and not is_part:
        raise DataError(f"{name} has no text: it is empty or blank; give another --input")
    empty = [writer.output.name for writer in writers if writer.meta.num_tokens == 0]
    if empty and not is_part:
        raise DataError(
            f"no document of {name} is for {' or '.join(empty)}: there are too few; give more documents or "
            "larger fractions"
        )
    message = f"{vocabulary} does not fit {name}: {unknown / max(tokens, 1):.1%} of the pieces are [UNK]"
    advice = "train a vocabulary on the text with --train_vocab"
    if tokens >= 1000 and unknown > MAX_UNKNOWN * tokens:
        raise VocabularyError(f"{message}; {advice}")
    if unknown > WARN_UNKNOWN * tokens:
        logger.warning("%s; %s", message, advice)
