"""Signals of a run: SIGTERM, SIGINT, SIGHUP and SIGUSR1.

The first three end the run after the step and a checkpoint. SIGUSR1 requests a checkpoint.

Outside `defer_stop` the first three raise `RunInterrupted` immediately, as Ctrl-C does in any Python program.
Inside, the first one takes effect after the step, and a second one exits at once. A signal to all processes
of a job reaches a worker twice, directly and through its launcher. Within two seconds it counts once. SIGHUP
is never a second signal: a closed terminal and its shell both send it, and systemd sends it after SIGTERM.
What follows it within two seconds is none either: session managers send SIGTERM then.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from DeBERTa.data.batch import Batch
from DeBERTa.processes import STOP_SIGNALS, RunInterrupted, list_handled_signals
from DeBERTa.training.distributed import all_reduce_sum, get_world_size

DUPLICATE_SECONDS = 1.0  # the same signal within this time was sent once and arrived twice
WAIT_SECONDS = 5  # after a stop signal, for a batch to come

Handler = Callable[[int, FrameType | None], Any] | int | None


class _WaitTimeoutError(Exception):
    """A batch did not come in time after a stop signal."""


class Signals:
    """Record the signals of this process.

    This is a context manager for the main thread. At its end it restores the handlers.
    """

    def __init__(self) -> None:
        self.stop_signal = 0  # number of the signal that ends the run
        self.is_save_requested = False
        self._stop_time = 0.0  # monotonic clock
        self._is_deferred = False
        self._is_waiting = False
        self._pid = os.getpid()
        self._previous_handlers: dict[int, Handler] = {}

    def __enter__(self) -> "Signals":
        for number in list_handled_signals():
            self._previous_handlers[number] = signal.signal(number, self._receive)
        self._previous_handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_wait)
        # The launcher starts its workers with SIGUSR1 blocked, so that it waits until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data worker that was just forked and has no handlers of its own yet
            return
        if number == signal.SIGUSR1:
            self.is_save_requested = True
            return
        if self.stop_signal:
            is_recent = time.monotonic() - self._stop_time < DUPLICATE_SECONDS
            is_same = self.stop_signal in (number, signal.SIGHUP)
            if number == signal.SIGHUP or (is_same and is_recent):
                return
            if self._is_deferred:
                os._exit(128 + number)
        self.stop_signal, self._stop_time = number, time.monotonic()
        if self._is_deferred:
            # Not the logger: the signal may have arrived while it held its lock.
            message = "finishing the step, then saving; a second signal exits at once"
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{signal.Signals(number).name}: {message}\n".encode())
        # A duplicate is handled while this sleeps. Later, its handler might have to wait for the end of a
        # long operation of PyTorch, and take it for a second signal.
        time.sleep(DUPLICATE_SECONDS)
        self._stop_time = time.monotonic()
        if not self._is_deferred:
            raise RunInterrupted(number)
        if self._is_waiting:
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)

    @contextlib.contextmanager
    def defer_stop(self) -> Iterator[None]:
        """Record stop signals for `exchange_requests` instead of raising `RunInterrupted`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextlib.contextmanager
    def allow_stop(self) -> Iterator[None]:
        """Raise `RunInterrupted` at once in this context inside `defer_stop`.

        This is for work without results to save.
        """
        self._is_deferred = False
        try:
            if self.stop_signal:
                raise RunInterrupted(self.stop_signal)
            yield
        finally:
            self._is_deferred = True

    def limit_waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches in `defer_stop`, and end a wait for one that does not come.

        If the batch has not come `WAIT_SECONDS` after a stop signal, the iteration ends. With several ranks
        `RunInterrupted` is raised: the other ranks may be in a step, so that no checkpoint can be saved.
        """
        while True:
            self._is_waiting = True
            if self.stop_signal:
                signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
            try:
                batch = next(batches, None)
            except _WaitTimeoutError:
                if get_world_size() > 1:
                    raise RunInterrupted(self.stop_signal) from None
                return
            finally:
                self._is_waiting = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            if batch is None:
                return
            yield batch

    def _end_wait(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_waiting:
            raise _WaitTimeoutError

    def exchange_requests(self) -> tuple[int, bool]:
        """All-reduce the requests of all ranks after a step.

        Returns, equal on all ranks, the number of the signal to stop for, or 0, and whether to save. The
        tensor is in host memory, so that no GPU synchronizes.
        """
        requests = [*(self.stop_signal == number for number in STOP_SIGNALS), self.is_save_requested]
        self.is_save_requested = False
        if get_world_size() > 1:
            requests = all_reduce_sum(torch.tensor(requests, dtype=torch.float64, device="cpu")).tolist()
        stops = [int(number) for number, is_sent in zip(STOP_SIGNALS, requests, strict=False) if is_sent]
        return next(iter(stops), 0), bool(requests[-1])
