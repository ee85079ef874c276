"""Encoding of raw text as lines of SentencePiece pieces.

Pieces are separated by single spaces. Every line of the input is encoded separately. The pieces of all lines
are concatenated, then split into lines of exactly `max_seq_length - 2` pieces regardless of where the input's
lines or documents end. Only the last line may be shorter.

One process reads and writes, the others encode. Only a few blocks are in memory at any time, whatever the
size of the input.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from DeBERTa.data.files import commit, get_state, open_partial
from DeBERTa.data.store_file import TokenStoreWriter, find_store, get_store_path, write_store
from DeBERTa.data.text import BLOCK_BYTES, TextFile, decode_block, split_lines
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, VocabularyError

BLOCKS_AHEAD = 2  # blocks in flight per process, so that none waits for the writer
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


def prepare(
    source: Path,
    output: Path,
    vocabulary: Path,
    max_seq_length: int = 512,
    errors: str = "strict",
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> PreparedText:
    """Write `output` and its token ids from the text `source` if needed.

    Args:
        vocabulary: a SentencePiece model with DeBERTa's ids.
        errors: how to treat invalid UTF-8, "strict" (raise) or "replace".
        workers: processes that encode, by default one per core; with 1, this process encodes.
        block_bytes: bytes of input per block.

    Raises `DataError`, `VocabularyError` or `StorageError`; `output` is then as it was before.
    """
    output = _check_paths(source, output, vocabulary)
    if max_seq_length < MIN_SEQ_LENGTH:
        raise DataError(
            f"--max_seq_length {max_seq_length} is too small: nothing fits between [CLS] and [SEP]; pass 512"
        )
    text, encoder = TextFile(source), _Encoder(vocabulary)
    recipe = _describe_source(source) | {"max_seq_length": max_seq_length, "errors": errors}
    prepared = _find_prepared(output, recipe, encoder.tokenizer)
    if prepared is not None:
        return prepared
    start = time.perf_counter()
    with open_partial(output) as file:
        # Another process may have written it while this one waited for the lock.
        prepared = _find_prepared(output, recipe, encoder.tokenizer)
        if prepared is not None:
            return prepared
        with write_store(get_store_path(output)) as store:
            blocks = _encode_blocks(text, encoder, errors, workers or count_usable_cores(), block_bytes)
            # Closing ends the processes and the progress bar if writing fails.
            with contextlib.closing(_show_progress(blocks, text, f"preparing {output.name}")) as shown:
                input_bytes, unknown = _write(shown, encoder, max_seq_length - 2, file, store)
            _check_unknown(unknown, store.meta.num_tokens, source, vocabulary)
            commit(file, output)
            store.meta.text = get_state(output.stat())
            store.meta.recipe = recipe | {
                "input_bytes": input_bytes,
                "vocabulary_path": str(vocabulary.resolve()),
            }
            store.commit()
    meta = store.meta
    return PreparedText(output, meta.lines, meta.num_tokens, input_bytes, time.perf_counter() - start)


def _check_paths(source: Path, output: Path, vocabulary: Path) -> Path:
    """Return `output` with symbolic links resolved, so that links to it remain.

    Raises `DataError` if the output is also an input, or is not a regular file.
    """
    for path, name in ((source, "input"), (vocabulary, "vocabulary")):
        if output.exists() and path.exists() and output.samefile(path):
            raise DataError(f"cannot write {output}: it is also the {name}; give another --output")
    if output.exists() and not output.is_file():
        raise DataError(f"cannot write {output}: it is a directory or a device; give a file name")
    return output.resolve()


def _describe_source(source: Path) -> dict[str, Any]:
    return {"input": str(source.resolve()), **get_state(source.stat())}


def _find_prepared(output: Path, recipe: dict[str, Any], tokenizer: Tokenizer) -> PreparedText | None:
    store = find_store(output, tokenizer.fingerprint) if output.is_file() else None
    if store is None or store.meta.recipe is None or not recipe.items() <= store.meta.recipe.items():
        return None
    meta = store.meta
    return PreparedText(output, meta.lines, meta.num_tokens, store.meta.recipe["input_bytes"], None)


class _EncodedBlock(NamedTuple):
    """An encoded block: bytes of input, ids int32 [n], and their pieces.

    Each piece has one space before it.
    """

    input_bytes: int
    ids: np.ndarray
    pieces: bytes


class _Encoder:
    """Turns blocks of text into ids and pieces.

    `piece_bytes`: int64 [pieces], the length of each piece in the output, including its space, in bytes.
    """

    def __init__(self, vocabulary: Path) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = Tokenizer(vocabulary)
        written = [b" " + piece.encode() for piece in self.tokenizer.pieces]
        self.piece_bytes = np.array([len(piece) for piece in written])
        self._written = np.array(written, dtype=object)

    def encode(self, path: Path, offset: int, block: bytes, errors: str) -> _EncodedBlock:
        """Encode a block that begins at byte `offset` of the file `path`."""
        ids = self.tokenizer.encode_utf8(split_lines(decode_block(path, offset, block, errors)))
        return _EncodedBlock(len(block), ids, b"".join(self._written[ids].tolist()))


def _encode_blocks(
    text: TextFile, encoder: _Encoder, errors: str, workers: int, block_bytes: int
) -> Generator[_EncodedBlock, None, None]:
    """Yield every block in order, encoded here or in `workers` processes."""
    blocks = text.read_blocks(block_bytes)
    first = list(islice(blocks, 2))
    blocks = chain(first, blocks)
    if workers == 1 or len(first) < 2:
        for offset, block in blocks:
            yield encoder.encode(text.path, offset, block, errors)
    else:
        yield from _encode_in_processes(blocks, text.path, encoder.vocabulary, errors, workers)


def _encode_in_processes(
    blocks: Iterable[tuple[int, bytes]], path: Path, vocabulary: Path, errors: str, workers: int
) -> Generator[_EncodedBlock, None, None]:
    """Yield every block in order, encoded in `workers` processes.

    One thread per process starts it and sends it blocks.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[tuple[SpawnProcess, Connection]] = []
    local = threading.local()

    def start_process() -> None:
        local.connection, remote = context.Pipe()
        process = context.Process(target=_serve, args=(remote, path, vocabulary, errors), daemon=True)
        process.start()
        remote.close()  # so that reading fails once the process is dead, even in the middle of a result
        processes.append((process, local.connection))

    def encode(offset: int, block: bytes) -> _EncodedBlock:
        try:
            local.connection.send((offset, block))
            result = local.connection.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"cannot encode {path}: a worker process died; pass fewer --workers if memory ran out"
            ) from error
        if isinstance(result, DataError):
            raise result
        return result

    threads = ThreadPoolExecutor(workers, initializer=start_process)
    pending: deque[Future[_EncodedBlock]] = deque()
    try:
        for offset, block in blocks:
            pending.append(threads.submit(encode, offset, block))
            if len(pending) == workers * BLOCKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        for process, connection in processes:
            connection.close()
            process.join()


def _serve(connection: Connection, path: Path, vocabulary: Path, errors: str) -> None:
    """Encode blocks until the parent process closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    encoder = _Encoder(vocabulary)
    with contextlib.suppress(EOFError, OSError):
        while True:
            offset, block = connection.recv()
            try:
                result: _EncodedBlock | DataError = encoder.encode(path, offset, block, errors)
            except DataError as error:
                result = error
            connection.send(result)


def _show_progress(
    blocks: Generator[_EncodedBlock, None, None], text: TextFile, label: str
) -> Generator[_EncodedBlock, None, None]:
    """Yield the blocks, with a progress bar over the bytes of the file."""
    with (
        tqdm(desc=label, total=text.bytes_on_disk, unit="B", unit_scale=True) as bar,
        contextlib.closing(blocks),
    ):
        for block in blocks:
            yield block
            bar.update(text.position - bar.n)


def _write(
    blocks: Iterable[_EncodedBlock], encoder: _Encoder, width: int, file: BinaryIO, store: TokenStoreWriter
) -> tuple[int, int]:
    """Write the blocks as lines of `width` pieces.

    Returns the number of bytes of input, and the number of [UNK] pieces.
    """
    digest, meta = hashlib.sha256(), store.meta
    input_bytes = unknown = 0

    def write(data: bytes | memoryview) -> None:
        file.write(data)
        digest.update(data)

    for block_bytes, ids, pieces in blocks:
        start = meta.num_tokens
        line_starts = np.arange(-start % width, len(ids), width)
        piece_bytes = encoder.piece_bytes[ids]
        buffer = np.frombuffer(bytearray(pieces), np.uint8)
        buffer[(np.cumsum(piece_bytes) - piece_bytes)[line_starts]] = ord("\n")
        write(buffer.data[1:] if start == 0 else buffer.data)
        store.append(ids, np.arange(start // width + 1, (start + len(ids)) // width + 1) * width)
        input_bytes += block_bytes
        unknown += int(np.count_nonzero(ids == encoder.tokenizer.unk_id))
    write(b"\n")
    if meta.num_tokens % width:
        store.append(np.empty(0, np.int32), np.array([meta.num_tokens]))
    meta.text_sha256, meta.vocabulary_sha256 = digest.hexdigest(), encoder.tokenizer.fingerprint
    meta.longest, meta.longest_line = min(meta.num_tokens, width), 1
    return input_bytes, unknown


def _check_unknown(unknown: int, tokens: int, source: Path, vocabulary: Path) -> None:
    """Check the share of [UNK]: warn above 5 %, raise above 20 %.

    Raises `VocabularyError` above 20 % of at least 1,000 tokens, and `DataError` if there are no tokens.
    """
    if tokens == 0:
        raise DataError(f"{source} has no text: it is empty or blank; give another --input")
    message = f"{vocabulary} does not fit {source}: {unknown / tokens:.1%} of the pieces are [UNK]"
    advice = "train a vocabulary on the text with --train_vocab"
    if tokens >= 1000 and unknown > MAX_UNKNOWN * tokens:
        raise VocabularyError(f"{message}; {advice}")
    if unknown > WARN_UNKNOWN * tokens:
        logger.warning("%s; %s", message, advice)
