"""Batches prefetched by data workers.

A worker writes its batch to memory that it has shared with its rank since it was forked, and sends only where
the tensors are. PyTorch's own transfer needs a file in /dev/shm and an open file per tensor. Where one of
these runs out, it drops the batch, and the rank waits forever.
"""

import atexit
import errno
import mmap
import multiprocessing
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from DeBERTa.data.batch import Batch, MaskedPositions
from DeBERTa.data.dataset import EvaluationBatches, TrainingBatches
from DeBERTa.errors import DataWorkerError, DebertaError, StorageError
from DeBERTa.processes import STOP_SIGNALS, exit_with_parent

FORK = multiprocessing.get_context("fork")
PREFETCHED = 4  # batches per data worker
ALIGNMENT = 64  # bytes
BYTES_PER_TOKEN = 41  # of a batch in which every token is masked
Batches = TrainingBatches | EvaluationBatches
WITH_WORKERS: WeakSet[Generator[Batch]] = WeakSet()  # iterators that have data workers


class Place(NamedTuple):
    """A tensor in shared memory."""

    first: int  # byte
    shape: torch.Size
    dtype: torch.dtype


class Stored(NamedTuple):
    """A batch in a slot of shared memory."""

    slot: int
    places: list[Place]
    real_tokens: int


class SharedBatches(Dataset):
    """Batches that data workers write to slots of memory shared with their rank.

    There is one more slot than batches are prefetched: a slot is free again once the rank has read its batch.
    """

    def __init__(self, batches: Batches, indices: Sequence[int], slots: int) -> None:
        self.batches, self.indices = batches, indices
        size = batches.plan.max_tokens * BYTES_PER_TOKEN + 7 * ALIGNMENT
        self.slots = [mmap.mmap(-1, size) for _ in range(slots)]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.indices)

    def __getitem__(self, number: int) -> Stored | DebertaError | MemoryError:
        """Write a batch; return where it is, or why it cannot be prepared.

        Data workers call this.
        """
        try:
            batch = self.batches[self.indices[number]]
        except DebertaError as error:
            return error
        except MemoryError as error:
            return MemoryError(str(error))
        slot, first, places = number % len(self.slots), 0, []
        for tensor in (*batch[:4], *batch.masked):
            place = Place(first, tensor.shape, tensor.dtype)
            self._view(slot, place).copy_(tensor)
            places.append(place)
            first += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return Stored(slot, places, batch.real_tokens)

    def read(self, stored: Stored) -> Batch:
        """Return a copy of a batch, in pinned memory if there is a GPU."""
        has_gpu = torch.cuda.is_available()
        views = [self._view(stored.slot, place) for place in stored.places]
        tensors = [torch.empty_like(view, pin_memory=has_gpu).copy_(view) for view in views]
        input_ids, input_mask, labels, uniforms, *masked = tensors
        return Batch(input_ids, input_mask, labels, uniforms, MaskedPositions(*masked), stored.real_tokens)

    def _view(self, slot: int, place: Place) -> torch.Tensor:
        count = place.shape.numel()
        if not count:  # `frombuffer` refuses it
            return torch.empty(place.shape, dtype=place.dtype)
        values = torch.frombuffer(self.slots[slot], dtype=place.dtype, count=count, offset=place.first)
        return values.view(place.shape)


def load_batches(batches: Batches, indices: Sequence[int], workers: int) -> Iterator[Batch]:
    """Load batches in order, prefetched by `workers` data workers.

    The data workers end with the iterator. Raises the errors of the package that occur in a data worker, and
    `StorageError` if it cannot be started.
    """
    if not workers:
        loaded = (batches[index] for index in indices)
        return (batch.pin_memory() if torch.cuda.is_available() else batch for batch in loaded)
    loader = _load_in_workers(batches, indices, workers)
    WITH_WORKERS.add(loader)
    return loader


@atexit.register
def _end_workers() -> None:
    """End the data workers of iterators that are referenced until the process exits.

    A traceback or a global variable may hold them. `multiprocessing` would end them by SIGTERM, which they
    ignore, and wait for them.
    """
    for loader in list(WITH_WORKERS):
        loader.close()


def _load_in_workers(batches: Batches, indices: Sequence[int], workers: int) -> Generator[Batch]:
    others = set(FORK.active_children())
    try:
        _reserve_and_release(workers)
        shared = SharedBatches(batches, indices, workers * PREFETCHED + 1)
        with warnings.catch_warnings():
            # PyTorch warns of fewer cores than workers, which mostly wait.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                shared,
                batch_size=None,
                collate_fn=lambda item: item,
                num_workers=workers,
                prefetch_factor=PREFETCHED,
                worker_init_fn=_set_up_worker,
                multiprocessing_context=FORK,
            )
            items = iter(loader)
    except OSError as error:
        for process in set(FORK.active_children()) - others:
            process.kill()
        raise StorageError(_describe_failed_start(error)) from error
    try:
        for item in items:
            if isinstance(item, DebertaError | MemoryError):
                raise item
            yield shared.read(item)
    finally:
        del items  # ends the workers, which a traceback would keep alive


def _reserve_and_release(workers: int) -> None:
    """Raise `OSError` without the locks and open files that DataLoader needs.

    Its workers need them. DataLoader cannot be ended cleanly once it has been half started.
    """
    for queue in [FORK.SimpleQueue() for _ in range(2 * workers + 4)]:
        queue.close()


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Raise `DataWorkerError` when a data worker died.

    DataLoader raises a `RuntimeError` in the main thread when it receives SIGCHLD.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        for _ in range(2):  # another worker may have died: its handler runs in the first call
            with suppress(RuntimeError):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise DataWorkerError(
            "a data worker died or was killed, perhaps because memory ran out (fewer --workers need less); "
            "the same command resumes from the last checkpoint"
        ) from error


def _describe_failed_start(error: OSError) -> str:
    """Return why data workers could not be started, and what to do."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "data workers need more open files than allowed: raise `ulimit -n`, or give fewer --workers"
    failure = f"data workers cannot be started: {error.strerror}"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return f"{failure}; give fewer --workers, or --workers 0"
    # Their locks are files there, of a page each.
    is_full = error.errno == errno.ENOSPC
    advice = (
        f"{'enlarge it (for Docker: --shm-size 1g)' if is_full else 'make it writable'}, or give --workers 0"
    )
    return f"{failure}, for their locks in /dev/shm; {advice}"


def _set_up_worker(_worker: int) -> None:
    """Make a data worker ignore signals and exit with its rank."""
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent(signal.SIGKILL)
