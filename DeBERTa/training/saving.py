"""Saving while training continues: a thread writes the snapshots, one checkpoint at a time."""

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from DeBERTa.training.checkpoint import Snapshot, write_checkpoint

NICENESS = 10  # of -20 to 19


class Saver:
    """Writes snapshots of one run. The next `save`, `check` or `wait` raises the thread's error."""

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir, self.keep_last = run_dir, keep_last
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=lower_thread_priority
        )
        self._writing: Future | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was started whose end no call has returned yet."""
        return self._writing is not None

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Start writing `snapshot`; `best` is the step of a checkpoint not to prune."""
        self.wait()
        self._writing = self._executor.submit(write_checkpoint, self.run_dir, snapshot, self.keep_last, best)

    def check(self) -> Path | None:
        """Return the checkpoint completed since the last call, if any. Raises `StorageError`."""
        return self.wait() if self._writing and self._writing.done() else None

    def wait(self) -> Path | None:
        """Wait for the checkpoint being written, if any, and return it. Raises `StorageError`."""
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def close(self) -> None:
        """Wait until nothing is being written; errors are not raised."""
        self._executor.shutdown(wait=True)


def lower_thread_priority() -> None:
    """Give this thread only the CPU time that training leaves."""
    if sys.platform == "linux":  # elsewhere the call is for the complete process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
