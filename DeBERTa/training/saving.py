"""Asynchronous checkpoints.

A thread writes one snapshot at a time while training continues.
"""

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from DeBERTa.training.checkpoint import Snapshot, write_checkpoint
from DeBERTa.training.run_lock import RunLock

NICENESS = 10  # of -20 to 19


class Saver:
    """Asynchronous writer of the snapshots of one run.

    The next `save`, `check` or `wait` raises the error of its thread.
    """

    def __init__(self, run_dir: Path, keep_last: int, lock: RunLock | None = None) -> None:
        self.run_dir, self.keep_last, self.lock = run_dir, keep_last, lock
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=lower_thread_priority
        )
        self._writing: Future | None = None

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Start writing `snapshot`.

        `best` is the step of a checkpoint that is not pruned.
        """
        self.wait()
        self._writing = self._executor.submit(
            write_checkpoint, self.run_dir, snapshot, self.keep_last, best, self.lock
        )

    def check(self) -> Path | None:
        """Return the checkpoint completed since the last call, if any.

        Raises `StorageError` if it could not be written.
        """
        return self.wait() if self._writing and self._writing.done() else None

    def wait(self) -> Path | None:
        """Wait for the checkpoint being written, if any, and return it.

        Raises `StorageError` if it could not be written.
        """
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def close(self) -> None:
        """Wait until nothing is being written, without raising errors."""
        self._executor.shutdown(wait=True)


def lower_thread_priority() -> None:
    """Lower the priority of this thread below that of training."""
    if sys.platform == "linux":  # elsewhere the call applies to the full process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
