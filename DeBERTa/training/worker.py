"""Processes that a launcher started: their variables, logs, failures and end.

The launcher is ours or torchrun.
A process without a launcher trains alone, as local rank 0 of one node. A rank records its failure in a file.
Its launcher reads it and publishes it to the other nodes.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NoReturn, TextIO

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from DeBERTa.errors import DebertaError, ReportedError
from DeBERTa.log import open_output
from DeBERTa.processes import STOP_SIGNALS, exit_with_parent

LOGS = "logs"  # directory of the ranks' logs in a run directory
STORE_THREAD = "store"  # name of the launcher's threads that wait for a store
# Variables of our launcher's workers, besides those that torchrun sets.
LAUNCHER_PID, FAILURE_FILE = "DEBERTA_LAUNCHER_PID", "DEBERTA_FAILURE_FILE"
LAUNCH_ID = "DEBERTA_LAUNCH_ID"  # the same in all attempts of one command
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


def is_worker() -> bool:
    """Return whether our launcher (`launch.py`) or torchrun started this process."""
    return "LOCAL_RANK" in os.environ and (LAUNCHER_PID in os.environ or "TORCHELASTIC_RUN_ID" in os.environ)


def get_local_rank() -> int:
    """Return the local rank: the index of this process on its node."""
    return int(os.environ["LOCAL_RANK"]) if is_worker() else 0


def get_log_path(run_dir: Path, rank: int) -> Path:
    """Return the log of one rank, on the disk of its node."""
    return run_dir / LOGS / f"rank-{rank:04d}.log"


def get_num_nodes() -> int:
    """Return the number of nodes of the run."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_worker() else 1


@contextmanager
def log_rank(run_dir: Path) -> Iterator[None]:
    """Redirect the output of this worker to its log.

    Python's stderr of rank 0 goes to the console, too. An error that ends the worker goes to its log with its
    traceback, and to the launcher as a `Failure`. When the launcher is killed, the worker receives SIGTERM.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    exit_with_parent(signal.SIGTERM, int(launcher) if launcher else None)
    log, console = redirect_stderr(get_log_path(run_dir, int(os.environ["RANK"])))
    os.dup2(log.fileno(), 1)
    sys.stdout, sys.stderr = log, _Tee(log, console) if os.environ["RANK"] == "0" else log
    try:
        yield
    except Exception as error:
        traceback.print_exc(file=log)
        if launcher:
            Path(os.environ[FAILURE_FILE]).write_text(Failure.from_error(error).to_json(), encoding="utf-8")
        else:
            ErrorHandler().record_exception(error)  # for torchrun's report
        raise ReportedError from error


def redirect_stderr(path: Path) -> tuple[TextIO, TextIO]:
    """Redirect stderr, including that of native libraries, to a log.

    Returns the log and the console.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    console, log = open_output(os.dup(2)), open_output(path, "a")
    os.dup2(log.fileno(), 2)
    return log, console


def exit_process(status: int) -> NoReturn:
    """Exit with `status`.

    Workers and launchers exit without Python's finalization, during which threads of the communication
    libraries may abort the process although all its work is done. So does a process with data workers that
    do not end: finalization would wait for them. They end with their parent.
    """
    has_threads = any(thread.name == STORE_THREAD for thread in threading.enumerate())
    if is_worker() or has_threads or multiprocessing.active_children():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Tee(io.TextIOBase):
    """Write text to several files.

    It is not a terminal, so that progress is logged in lines.
    """

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()


@dataclass(frozen=True)
class Failure:
    """Reason why a rank, and with it an attempt at the run, ended."""

    message: str
    exit_status: int = 1
    is_retryable: bool = False
    is_consequence: bool = False  # of the failure of another rank
    is_abort: bool = False  # SIGABRT, by which NCCL ends ranks that lost another one
    is_explained: bool = False  # the message is written for users and needs no log
    node: int = 0
    time: float = field(default_factory=time.time)  # seconds since the epoch

    @staticmethod
    def from_error(error: Exception) -> "Failure":
        """Return the failure of a rank that ends with `error`."""
        if not isinstance(error, DebertaError):
            return Failure(f"{type(error).__name__}: {error}")
        is_consequence = error.is_consequence
        return Failure(
            str(error), error.exit_status, error.is_retryable, is_consequence, is_explained=not is_consequence
        )

    @staticmethod
    def from_exit_code(code: int, record: Path | None = None) -> "Failure":
        """Return the failure of a rank from its exit code, and its record, if any.

        The exit code is negative for a signal.
        """
        stop_signal = get_stop_signal(code)
        if stop_signal:
            return Failure(f"stopped by {signal.Signals(stop_signal).name}", 128 + stop_signal)
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
            message = f"killed by {names.get(-code, f'signal {-code}')}"
            return Failure(message, is_retryable=True, is_abort=code == -signal.SIGABRT)
        text = record.read_bytes() if record and record.is_file() else b""
        return _parse(text) or Failure(f"exited with status {code}", is_retryable=True)

    @staticmethod
    def from_json(text: str | bytes) -> "Failure":
        """Read a failure that `to_json` wrote, on this machine or another one.

        Anything else, for example one with status 0, is a failure, too.
        """
        return _parse(text) or Failure(
            "another node reported a failure that cannot be read: look at the messages of every node"
        )

    def to_json(self) -> str:
        """Return all fields as one line of JSON."""
        return json.dumps(asdict(self))

    @property
    def is_stop(self) -> bool:
        """Return whether a signal requested the end."""
        return get_stop_signal(self.exit_status) != 0

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key: causes, aborts, stops, consequences, each by time."""
        return (3 if self.is_consequence else 2 if self.is_stop else int(self.is_abort)), self.time


def _parse(text: str | bytes) -> Failure | None:
    """Return the failure that `to_json` wrote, or None for any other text."""
    try:
        failure = Failure(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    are_valid = all(type(getattr(failure, item.name)) is item.type for item in fields(Failure))
    return failure if are_valid and 0 < failure.exit_status < 256 else None


def get_stop_signal(code: int) -> int:
    """Return the stop signal of an exit code, or 0 if there is none.

    For example, 143 and -15 are SIGTERM.
    """
    return next((int(number) for number in STOP_SIGNALS if code in (128 + number, -number)), 0)
