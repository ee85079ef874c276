"""Saving while training goes on: the state is copied, then written by a thread, one checkpoint at a time."""

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from DeBERTa.training.checkpoint import Snapshot, crash_point, write_checkpoint

NICENESS = 10  # of -20 to 19


class Saver:
    """Writes snapshots of one run. Errors of the thread are raised by the next call of `save`, `check` or `wait`."""

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir, self.keep_last = run_dir, keep_last
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=lower_thread_priority
        )
        self._writing: Future | None = None

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Start writing `snapshot`. `best` is the step of a checkpoint to keep whatever its age."""
        crash_point("snapshot-taken", snapshot.step)
        self.wait()
        self._writing = self._thread.submit(write_checkpoint, self.run_dir, snapshot, self.keep_last, best)

    def check(self) -> Path | None:
        """The checkpoint that was completed since the last call, if any. Raises `StorageError` if it failed."""
        return self.wait() if self._writing and self._writing.done() else None

    def wait(self) -> Path | None:
        """Wait for the checkpoint being written, if any. Raises `StorageError` if it failed."""
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def close(self) -> None:
        """Let the checkpoint being written be finished."""
        self._thread.shutdown(wait=True)


def lower_thread_priority() -> None:
    """Let this thread take only what training leaves of the cores."""
    if sys.platform == "linux":  # elsewhere the call is for the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
