"""Encoding of blocks of raw text in many processes, in order.

Only a few blocks are in memory at any time, whatever the size of the input.
"""

import contextlib
import hashlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from DeBERTa.data.sources import Reading
from DeBERTa.data.text import Block, read_documents, split_lines
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, DebertaError

BLOCKS_AHEAD = 2  # blocks in flight per process, so that none waits for the writer


@dataclass(frozen=True)
class Recipe:
    """How text becomes pieces.

    Attributes:
        vocabulary: a SentencePiece model with DeBERTa's ids.
        ranges: for each output after the first one, which hashes of documents go to it, from 0 to 1.
    """

    vocabulary: Path
    reading: Reading = field(default_factory=Reading)
    ranges: tuple[tuple[float, float], ...] = ()


class EncodedText(NamedTuple):
    """Ids, int32 [n], and their pieces, each with one space before it."""

    ids: np.ndarray
    pieces: bytes


class EncodedBlock(NamedTuple):
    """An encoded block: bytes of input, and the text for each output."""

    input_bytes: int
    texts: list[EncodedText]


def choose_output(document: bytes, ranges: Sequence[tuple[float, float]]) -> int:
    """Return the output of a document, 0 or the number of a range from 1.

    It follows from the text of the document alone: more input does not move it, and equal documents stay
    together.
    """
    position = int.from_bytes(hashlib.blake2b(document.strip(), digest_size=8).digest(), "big") / 2**64
    numbers = (number for number, (start, end) in enumerate(ranges, 1) if start <= position < end)
    return next(numbers, 0)


class Encoder:
    """Turns blocks of text into ids and pieces.

    `piece_bytes`: int64 [pieces], the length of each piece in the output, including its space, in bytes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = Tokenizer(recipe.vocabulary)
        written = [b" " + piece.encode() for piece in self.tokenizer.pieces]
        self.piece_bytes = np.array([len(piece) for piece in written])
        self._written = np.array(written, dtype=object)

    def encode(self, block: Block) -> EncodedBlock:
        """Encode a block."""
        reading, ranges = self.recipe.reading, self.recipe.ranges
        lines: list[list[bytes]] = [[] for _ in range(1 + len(ranges))]
        for document in read_documents(block, reading.column, reading.errors):
            lines[choose_output(document, ranges) if ranges else 0] += split_lines(document)
        return EncodedBlock(block.count_bytes(), [self._encode_lines(part) for part in lines])

    def _encode_lines(self, lines: list[bytes]) -> EncodedText:
        ids = self.tokenizer.encode_utf8(lines)
        return EncodedText(ids, b"".join(self._written[ids].tolist()))


def encode_blocks(blocks: Iterator[Block], encoder: Encoder, workers: int) -> Generator[EncodedBlock]:
    """Yield every block in order, encoded here or in `workers` processes."""
    first = list(islice(blocks, 2))
    blocks = chain(first, blocks)
    if workers == 1 or len(first) < 2:
        yield from map(encoder.encode, blocks)
    else:
        yield from _encode_in_processes(blocks, encoder.recipe, workers)


def _encode_in_processes(blocks: Iterable[Block], recipe: Recipe, workers: int) -> Generator[EncodedBlock]:
    """Yield every block in order, encoded in `workers` processes.

    One thread per process starts it and sends it blocks.
    """
    context = multiprocessing.get_context("spawn")
    context.Lock()  # starts the resource tracker, which otherwise unblocks SIGINT in `start_process`
    processes: list[tuple[SpawnProcess, Connection]] = []
    local = threading.local()

    def start_process() -> None:
        # The worker inherits the mask, so that Ctrl-C cannot interrupt its start.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        local.connection, remote = context.Pipe()
        process = context.Process(target=_serve, args=(remote, recipe), daemon=True)
        process.start()
        remote.close()  # so that reading fails once the process is dead, even in the middle of a result
        processes.append((process, local.connection))

    def encode(block: Block) -> EncodedBlock:
        try:
            local.connection.send(block)
            result = local.connection.recv()
        except (EOFError, OSError) as error:
            advice = "pass fewer --workers if memory ran out"
            raise DataError(f"cannot encode {block.path}: a worker process died; {advice}") from error
        if isinstance(result, DebertaError):
            raise result
        return result

    threads = ThreadPoolExecutor(workers, initializer=start_process)
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            pending.append(threads.submit(encode, block))
            if len(pending) == workers * BLOCKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        for process, connection in processes:
            connection.close()
            process.join()


def _serve(connection: Connection, recipe: Recipe) -> None:
    """Encode blocks until the parent process closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    encoder = Encoder(recipe)
    with contextlib.suppress(EOFError, OSError):
        while True:
            block = connection.recv()
            try:
                result: EncodedBlock | DebertaError = encoder.encode(block)
            except DebertaError as error:
                result = error
            connection.send(result)
