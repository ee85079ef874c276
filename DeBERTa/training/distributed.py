"""Ranks of a run: their process group, logs, reductions and gathers.

Without a process group every function returns the result for a single process, so that callers need no
special case.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from DeBERTa.errors import PeerLostError, ReportedError
from DeBERTa.processes import exit_with_parent
from DeBERTa.training.failures import Failure
from DeBERTa.training.metrics import Sums

LOGS = "logs"  # directory of the ranks' logs in a run directory
STORE_THREAD = "store"  # name of the launcher's threads that wait for a store
ENDING_SECONDS = 15  # for a rank that lost its peers to end, and for the launchers to end all others
# Variables of our launcher's workers, besides those that torchrun sets.
LAUNCHER_PID, FAILURE_FILE = "DEBERTA_LAUNCHER_PID", "DEBERTA_FAILURE_FILE"
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


@contextmanager
def join_process_group(timeout: int) -> Iterator[None]:
    """Join the process group in a worker, and destroy it at the end.

    The backend is Gloo between CPUs and NCCL between GPUs. Ranks have `timeout` seconds to join. The timeout
    of collectives is shorter, so that all have ended `timeout` seconds after a rank was lost. Raises
    `PeerLostError` then.
    """
    if not is_worker() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", get_local_rank())
        torch.cuda.set_device(device)
    store: dist.Store | None = None  # under torchrun, at MASTER_ADDR:MASTER_PORT
    with translate_peer_errors(timeout):
        if LAUNCHER_PID in os.environ:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, timeout=timedelta(seconds=timeout))
            store = dist.PrefixStore(f"ranks-{os.environ[RESTART_COUNT]}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=timeout - min(ENDING_SECONDS, timeout / 3)),
            device_id=device,
        )
        yield
        barrier()  # no rank leaves while another one still writes
    dist.destroy_process_group()


@contextmanager
def translate_peer_errors(timeout: int) -> Iterator[None]:
    """Raise `PeerLostError` for errors of torch.distributed after the loss of a rank."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # Gloo's errors have no class of their own. They name its source file; the one of a collective that
        # failed because a concurrent one timed out does not.
        is_gloo = type(error) is RuntimeError and ("gloo" in text or "pair closure" in text)
        if not is_gloo and not isinstance(error, dist.DistError):
            raise
        if "imed out" not in text and "imeout" not in text:
            raise PeerLostError("connection to another rank lost: its log says why") from error
        raise PeerLostError(
            f"no answer from another rank within --dist_timeout {timeout} s: it is stopped, slow or cut off"
        ) from error


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
        with suppress(OSError):  # the disk may be full
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
    console = open(os.dup(2), "w", buffering=1)  # noqa: PTH123, SIM115 (a descriptor that stays open)
    log = path.open("a", buffering=1)
    os.dup2(log.fileno(), 2)
    return log, console


def exit_process(status: int) -> NoReturn:
    """Exit with `status`.

    Workers and launchers exit without Python's finalization, during which threads of the communication
    libraries may abort the process although all its work is done.
    """
    if is_worker() or any(thread.name == STORE_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Tee:
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

    def isatty(self) -> bool:
        return False


def is_distributed() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of ranks of the run."""
    return dist.get_world_size() if is_distributed() else 1


def get_num_nodes() -> int:
    """Return the number of nodes of the run."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_worker() else 1


def is_rank_zero() -> bool:
    """Return whether this process writes the run directory and the console messages."""
    return get_rank() == 0


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place on every rank."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_sums(sums: Sums) -> Sums:
    """Sum all values over all ranks in float64.

    One all-reduce serves all names, which must be equal on all ranks.
    """
    if not is_distributed() or not sums:
        return sums
    values = all_reduce_sum(torch.stack([value.detach().double() for value in sums.values()]))
    return dict(zip(sums, values, strict=True))


def is_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true on any rank."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: object) -> list:
    """Return the picklable `value` of every rank, in order of ranks."""
    if not is_distributed():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable `value` on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]
