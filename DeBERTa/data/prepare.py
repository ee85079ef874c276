"""Raw text -> lines of exactly `max_seq_length - 2` SentencePiece pieces, separated by single spaces.

Every line of the input is encoded on its own. The pieces of all lines follow each other, and are cut into lines without
regard to where the input's lines or documents end; only the last line is shorter.

One process reads blocks and writes, the others encode. At any time only a few blocks are in memory, whatever the size
of the input.
"""

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from DeBERTa.data.files import get_partial_path, hash_file, open_atomic, open_partial
from DeBERTa.data.text import BLOCK_BYTES, TextFile, decode_block, read_training_sentences, split_lines
from DeBERTa.data.token_store import TokenStoreWriter, ids_folder, matches, read_meta
from DeBERTa.data.tokenizer import Tokenizer, train_vocabulary
from DeBERTa.errors import DataError, VocabularyError

BLOCKS_AHEAD = 2  # blocks in flight for each process, so that none waits for the writer
WARN_UNKNOWN, MAX_UNKNOWN = 0.05, 0.2  # shares of [UNK]
MIN_SEQ_LENGTH = 3  # [CLS], one piece, [SEP]


@dataclass
class PreparedText:
    """What was prepared: counts of the output, bytes of (decompressed) input, and how long it took.

    `seconds` is None if nothing had to be done.
    """

    output: Path
    lines: int
    num_tokens: int
    input_bytes: int
    seconds: float | None


def count_usable_cores() -> int:
    """Cores this process may run on."""
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
    label: str = "preparing",
) -> PreparedText:
    """Write `output` and its token ids from the text `source`, unless they are there already.

    Args:
        vocabulary: a SentencePiece model with DeBERTa's ids.
        errors: what to do with invalid UTF-8, "strict" (refuse) or "replace".
        workers: processes that encode, by default one a core; with 1 everything happens in this process.
        block_bytes: input that is encoded at once.
        label: what the progress bar says.

    Raises DataError or VocabularyError if something does not fit, OSError if something cannot be read or written.
    `output` is then as it was before.
    """
    if max_seq_length < MIN_SEQ_LENGTH:
        raise DataError(
            f"--max_seq_length {max_seq_length} leaves no room between [CLS] and [SEP]; 512 is usual."
        )
    for path, what in ((source, "input"), (vocabulary, "vocabulary")):
        if output.exists() and path.exists() and output.samefile(path):
            raise DataError(f"The output {output} is also the {what}; give it another name.")
    output = output.resolve()  # a link stays one; what it points to is replaced
    if output.exists() and not output.is_file():
        raise DataError(f"The output {output} is a folder or a device; give a file name.")
    text = TextFile(source)
    if not vocabulary.is_file():
        raise VocabularyError(f"There is no vocabulary {vocabulary}.")
    fingerprint = hash_file(vocabulary)
    recipe = {**_identity(source), "max_seq_length": max_seq_length, "errors": errors}
    done = _up_to_date(output, recipe, fingerprint)
    if done is not None:
        return done
    start = time.perf_counter()
    with open_partial(output) as file:
        done = _up_to_date(output, recipe, fingerprint)
        if done is not None:  # another process has made it meanwhile
            get_partial_path(output).unlink()
            return done
        with (
            _removed_on_failure(get_partial_path(output)),
            TokenStoreWriter(get_partial_path(ids_folder(output))) as store,
        ):
            file.truncate(0)
            encoder = _Encoder(vocabulary)
            chunks = _encoded(text, encoder, errors, workers or count_usable_cores(), block_bytes)
            with contextlib.closing(chunks):  # ends the processes at once if writing fails
                written = _write(label, text, chunks, encoder, max_seq_length - 2, file, store)
                input_bytes, text_sha256, unknown = written
            _check_unknown(unknown, store.num_tokens, source, vocabulary)
            file.flush()
            os.fsync(file.fileno())
            get_partial_path(output).replace(output)
            status = output.stat()
            store.commit(
                ids_folder(output),
                {
                    "text_bytes": status.st_size,
                    "text_mtime_ns": status.st_mtime_ns,
                    "text_sha256": text_sha256,
                    "vocabulary": fingerprint,
                    "longest": min(store.num_tokens, max_seq_length - 2),
                    "longest_line": 1,
                    "unknown": 0,
                    "prepared": {
                        **recipe,
                        "input_bytes": input_bytes,
                        "vocabulary_path": str(vocabulary.resolve()),
                    },
                },
            )
    return PreparedText(output, store.lines, store.num_tokens, input_bytes, time.perf_counter() - start)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _identity(source: Path) -> dict[str, Any]:
    status = source.stat()
    return {"input": str(source.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _up_to_date(output: Path, recipe: dict[str, Any], fingerprint: str) -> PreparedText | None:
    meta = read_meta(ids_folder(output))
    if meta is None or "prepared" not in meta or not recipe.items() <= meta["prepared"].items():
        return None
    if not output.is_file() or not matches(meta, output, fingerprint):
        return None
    return PreparedText(output, meta["lines"], meta["num_tokens"], meta["prepared"]["input_bytes"], None)


def _write(
    label: str,
    text: TextFile,
    chunks: Iterable[tuple[int, np.ndarray, bytes]],
    encoder: "_Encoder",
    width: int,
    file: BinaryIO,
    store: TokenStoreWriter,
) -> tuple[int, str, int]:
    """Write the encoded chunks as lines of `width` pieces.

    Returns bytes of input, SHA-256 of the output, and how many pieces are [UNK].
    """
    input_bytes = unknown = 0
    digest = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        file.write(data)
        digest.update(data)

    with tqdm(desc=label, total=text.bytes_on_disk, unit="B", unit_scale=True) as bar:
        for block_bytes, ids, pieces in chunks:
            seen = store.num_tokens
            line_starts = np.arange(-seen % width, len(ids), width)
            piece_bytes = encoder.piece_bytes[ids]
            buffer = np.frombuffer(bytearray(pieces), np.uint8)
            buffer[(np.cumsum(piece_bytes) - piece_bytes)[line_starts]] = ord("\n")
            put(buffer.data[1:] if seen == 0 else buffer.data)
            ends = np.arange(seen // width + 1, (seen + len(ids)) // width + 1) * width
            store.append(ids, ends)
            input_bytes += block_bytes
            unknown += int(np.count_nonzero(ids == encoder.tokenizer.unk_id))
            bar.update(text.position() - bar.n)
    if store.num_tokens == 0:
        raise DataError(f"{text.path} has no text.")
    put(b"\n")
    if store.num_tokens % width:
        store.append(np.empty(0, np.int32), np.array([store.num_tokens]))
    return input_bytes, digest.hexdigest(), unknown


def _check_unknown(unknown: int, tokens: int, source: Path, vocabulary: Path) -> None:
    """A vocabulary of another script or language is never silent: above 5 % [UNK] a warning, above 20 % an error."""
    told = f"{unknown / tokens:.1%} of the pieces of {source} are [UNK]: the vocabulary {vocabulary} does not fit"
    if tokens >= 1000 and unknown > MAX_UNKNOWN * tokens:
        raise VocabularyError(f"{told}; --train_vocab trains one on the text.")
    if unknown > WARN_UNKNOWN * tokens:
        print(f"warning: {told} well; --train_vocab trains one on the text", file=sys.stderr)


class _Encoder:
    """Turns blocks of text into ids and into pieces as they are written, each with one space before it.

    `piece_bytes`, int64 [pieces]: what each piece takes, its space included.
    """

    def __init__(self, vocabulary: Path):
        self.vocabulary = vocabulary
        self.tokenizer = Tokenizer(vocabulary)
        written = [b" " + piece.encode() for piece in self.tokenizer.pieces]
        self.piece_bytes = np.array([len(piece) for piece in written])
        self._written = np.array(written, dtype=object)

    def encode(self, path: Path, offset: int, block: bytes, errors: str) -> tuple[np.ndarray, bytes]:
        """Ids, int32, and pieces of a block that begins at byte `offset` of the file `path`."""
        ids = self.tokenizer.encode_utf8(split_lines(decode_block(path, offset, block, errors)))
        return ids, b"".join(self._written[ids].tolist())


def _encoded(
    text: TextFile, encoder: _Encoder, errors: str, workers: int, block_bytes: int
) -> Generator[tuple[int, np.ndarray, bytes], None, None]:
    """Bytes, ids and pieces of every block, in order."""
    blocks = text.blocks(block_bytes)
    beginning = list(islice(blocks, 2))
    blocks = chain(beginning, blocks)
    if workers == 1 or len(beginning) < 2:
        for offset, block in blocks:
            yield len(block), *encoder.encode(text.path, offset, block, errors)
        return
    pending: deque[tuple[int, Future]] = deque()
    strangers, started = set(multiprocessing.active_children()), set()
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder.vocabulary,),
    )
    try:
        for offset, block in blocks:
            pending.append((len(block), pool.submit(_encode, text.path, offset, block, errors)))
            started |= set(multiprocessing.active_children()) - strangers
            if len(pending) == workers * BLOCKS_AHEAD:
                size, future = pending.popleft()
                yield size, *_result(future, pool, started)
        for size, future in pending:
            yield size, *_result(future, pool, started)
    except BrokenProcessPool as error:
        raise DataError(
            "A process that encodes text died; if the machine ran out of memory, pass fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future, pool: ProcessPoolExecutor, workers: set[multiprocessing.Process]) -> Any:
    """The future's result. Raises `BrokenProcessPool` once one of the pool's `workers` is dead, however it died.

    Python's pool waits for ever for the rest of a result in whose middle its process was killed, because it holds the
    writing end of that pipe itself: here that end is closed.
    """
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():
                raise
        if not all(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.kill()
            pool._result_queue._writer.close()


_worker_encoder: _Encoder  # of a worker process


def _start_worker(vocabulary: Path) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process gets it too, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = _Encoder(vocabulary)


def _end_with_parent() -> None:
    """Without this, workers of a killed process would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(path: Path, offset: int, block: bytes, errors: str) -> tuple[np.ndarray, bytes]:
    return _worker_encoder.encode(path, offset, block, errors)


def find_or_train_vocabulary(source: Path, size: int, path: Path, errors: str = "strict") -> Path:
    """The vocabulary of `size` pieces trained on the text `source`, trained now unless `path` is it already.

    What it was trained on is recorded in `path` + `.json`. Another vocabulary at `path` is never written over: that
    raises VocabularyError.
    """
    record = path.with_name(path.name + ".json")
    if _is_trained(source, size, path, record):
        return path
    refusal = VocabularyError(
        f"{path} is not the vocabulary of {size} pieces trained on {source}, and is not written over: "
        "give another --vocab_path, or remove it."
    )
    with open_atomic(record) as file:
        if not _is_trained(source, size, path, record):  # another process may have done it meanwhile
            if path.exists() and record.exists():
                raise refusal
            print(f"training a vocabulary of {size} pieces on {source}", file=sys.stderr)
            fresh = path.with_name(path.name + ".new")
            train_vocabulary(read_training_sentences(source, errors), size, fresh)
            # A run killed before it wrote the record left the same bytes; any others are somebody's.
            if path.exists() and hash_file(path) != hash_file(fresh):
                fresh.unlink()
                raise refusal
            fresh.replace(path)
        made = {
            "pieces": size,
            **_identity(source),
            "text": hash_file(source),
            "vocabulary": hash_file(path),
        }
        file.write(json.dumps(made, indent=1).encode())
    return path


def _is_trained(source: Path, size: int, path: Path, record: Path) -> bool:
    if not path.is_file() or not record.is_file():
        return False
    try:
        made = json.loads(record.read_text())
    except ValueError:
        return False
    if made["pieces"] != size or made["vocabulary"] != hash_file(path):
        return False
    return _identity(source).items() <= made.items() or made["text"] == hash_file(source)
