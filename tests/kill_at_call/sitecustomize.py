"""Kill a process at its n-th call that changes a file, as a power cut would.

Python imports this file when it starts with this directory on PYTHONPATH; `KILL_AT_CALL` is the number n.
Forked runs call `kill_at_call` themselves. The calls of one thread come in the same order in each run, those
of several do not.
"""

import builtins
import functools
import io
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

CALLS = ("replace", "rename", "fsync", "unlink", "rmdir")
write_to_descriptor = os.write


class Countdown:
    """Counts calls, and ends the process at one of them."""

    def __init__(self, number: int, thread: str) -> None:
        self.number, self.thread = number, thread
        self.calls = itertools.count(1)

    def is_over(self) -> bool:
        """Count a call; return whether it is the last."""
        return threading.current_thread().name.startswith(self.thread) and next(self.calls) == self.number

    def kill(self, call: str) -> None:
        """Name the call on stderr and die."""
        write_to_descriptor(2, f"killed at {call}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


class CountedFile:
    """A file open for writing. Of its writes number 1, 2, 4, 8 and so on count: there may be thousands.

    The write at which the process dies is half done.
    """

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self.file, self.countdown, self.writes = file, countdown, 0

    def write(self, data: Any) -> int:
        """Write all of `data`, or half of it."""
        self.writes += 1
        if self.writes & (self.writes - 1) == 0 and self.countdown.is_over():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.countdown.kill(f"write {self.file.name}")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountedFile":
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def __iter__(self) -> Iterator:
        return iter(self.file)


def kill_at_call(number: int, thread: str = "") -> None:
    """Wrap the calls that change files, so that the process dies before the one with this number (from 1).

    Calls of threads whose names start with `thread` count.
    """
    countdown = Countdown(number, thread)

    def wrap(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **settings: Any) -> Any:
            if countdown.is_over():
                countdown.kill(f"{name} {arguments[0]}")
            return function(*arguments, **settings)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    open_file = io.open

    @functools.wraps(open_file)
    def open_counted(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        opened = open_file(file, mode, *arguments, **settings)
        return CountedFile(opened, countdown) if set(mode) & set("wax+") else opened

    io.open = builtins.open = open_counted


if __name__ == "sitecustomize" and "KILL_AT_CALL" in os.environ:
    kill_at_call(int(os.environ["KILL_AT_CALL"]))
