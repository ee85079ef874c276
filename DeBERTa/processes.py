"""Signal handling that all processes of the package share.

It defines the signals that stop a process, raises an exception for them, and ends a process with its parent.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process receives when its parent ends


class RunInterrupted(KeyboardInterrupt):
    """End of a run by a signal, with the `exit_status` that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextlib.contextmanager
def raise_interrupts() -> Iterator[None]:
    """Raise `RunInterrupted` at SIGTERM and SIGHUP, so that `finally` blocks run.

    Only the first one counts: a job and its shell, or `timeout`, often send several. Restores the handlers.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        raise RunInterrupted(number)

    numbers = {signal.SIGTERM, signal.SIGHUP}.intersection(list_handled_signals())
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in handlers:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def list_handled_signals() -> list[signal.Signals]:
    """Return the signals that a run handles: those that stop it, and SIGUSR1.

    SIGHUP is not among them where this process ignores it, as under `nohup`.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in (*STOP_SIGNALS, signal.SIGUSR1) if not (is_ignored and n == signal.SIGHUP)]


def exit_with_parent(signal_number: int, parent_pid: int | None = None) -> None:
    """Have the kernel send `signal_number` to this process when its parent ends.

    On other systems than Linux this is a no-op. With `parent_pid`, the signal is also sent if that parent has
    ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
    if parent_pid not in (None, os.getppid()):
        os.kill(os.getpid(), signal_number)
