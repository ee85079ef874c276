"""Signals a run answers: SIGTERM and SIGINT end it after the step and a save, SIGUSR1 asks for a save.

Outside `deferred` the first two end the run where it is, as Ctrl-C does in any Python program. Inside, the first one
waits for the step's end and the second ends the process at once, with what is on disk. Who signals all processes of a
job reaches a worker twice, directly and through its launcher: the same signal within a second counts once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import torch

from DeBERTa.training.distributed import all_reduce_sum, get_world_size

ENDING = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0
STEPS_BETWEEN_AGREEMENTS = 10  # on GPUs of several processes, where agreeing waits for the device


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run; `status` is the exit status shells expect of it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        return 128 + self.number


class Signals:
    """What this process was told so far. Used as a context in the main thread: handlers are put back afterwards."""

    def __init__(self) -> None:
        self.ending = 0  # number of the signal that ends the run
        self.save = False
        self._told = 0.0  # when the ending was asked for, by the monotonic clock
        self._deferred = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (*ENDING, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, [signal.SIGUSR1]
        )  # blocked by a launcher until it can be answered
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a worker just forked, which has not set its own handlers yet
            return
        if number == signal.SIGUSR1:
            self.save = True
        elif self.ending == number and time.monotonic() - self._told < SAME_SECONDS:
            return
        elif not self._deferred:
            self.ending, self._told = number, time.monotonic()
            raise Interrupted(number)
        elif self.ending:
            os._exit(128 + number)
        else:
            self.ending, self._told = number, time.monotonic()
            name = signal.Signals(number).name
            # Not print: the signal may have come while a line was being printed.
            os.write(2, f"\n{name}: finishing the step, then saving; a second one ends at once\n".encode())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals that end the run are kept until somebody asks."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside `deferred`: signals that end the run raise `Interrupted` again, where nothing can be lost."""
        self._deferred = False
        try:
            if self.ending:
                raise Interrupted(self.ending)
            yield
        finally:
            self._deferred = True

    def asked(self, step: int, device: torch.device) -> tuple[int, bool]:
        """After a step, the same in all processes: number of the signal to end on, or 0; whether to save.

        What any process was told counts for all. On GPUs of several processes they ask each other every tenth step.
        """
        if get_world_size() > 1 and device.type != "cpu" and step % STEPS_BETWEEN_AGREEMENTS:
            return 0, False
        ending, save, self.save = self.ending, self.save, False
        if get_world_size() > 1:
            told = torch.tensor(
                [*(ending == number for number in ENDING), save], device=device, dtype=torch.float64
            )
            *by_signal, saves = all_reduce_sum(told).tolist()
            ending = next((number for number, count in zip(ENDING, by_signal, strict=True) if count), 0)
            save = saves > 0
        return int(ending), save
