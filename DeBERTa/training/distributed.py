"""The processes of one run: which of them this is, and what is summed or compared over all of them.

Without a process group every function answers for a single process, so that callers need no special case.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from DeBERTa.errors import PeerLostError, ReportedError
from DeBERTa.processes import exit_with_parent
from DeBERTa.training.metrics import Sums

LOGS = "logs"  # folder of the processes' logs in a run's folder
ENDING_SECONDS = 15  # for a process that has given up to end, and for the agents to end all others


def is_worker() -> bool:
    """Whether an elastic agent started this process: ours (`launch.py`) or torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def get_local_rank() -> int:
    """Number of this process among those on its node."""
    return int(os.environ["LOCAL_RANK"]) if is_worker() else 0


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of one process, on the disk of its node."""
    return run_dir / LOGS / f"rank-{rank:04d}.log"


@contextmanager
def process_group(timeout: int) -> Iterator[None]:
    """Join the other processes of the run, if there are any, and leave them at the end.

    Gloo between CPUs, NCCL between GPUs. They have `timeout` seconds to come together, and to answer each other so much
    less that, with what it takes to end the others, all have ended after `timeout` seconds. Raises `PeerLostError` when
    one of them is lost.
    """
    if not is_worker() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    limit, patience = (
        timedelta(seconds=timeout),
        timedelta(seconds=timeout - min(ENDING_SECONDS, timeout / 3)),
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(get_local_rank())
        backend = "cpu:gloo,cuda:nccl"
    with translate_peer_errors(timeout):
        store, number, size = next(dist.rendezvous("env://", timeout=limit))
        # One store serves every attempt at the run: each needs keys of its own.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RUN_ID"], store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=patience)
        yield
        barrier()  # nobody leaves while another one still writes
    dist.destroy_process_group()


@contextmanager
def translate_peer_errors(timeout: int) -> Iterator[None]:
    """What torch.distributed says when another process is lost becomes a `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # Gloo's errors have no class of their own. They name its source file; the one of a collective that failed
        # because another one, in flight beside it, timed out does not.
        gloo = type(error) is RuntimeError and ("gloo" in text or "pair closure" in text)
        if not gloo and not isinstance(error, dist.DistError):
            raise
        if "imed out" not in text and "imeout" not in text:
            raise PeerLostError("the connection to another process broke off") from error
        raise PeerLostError(
            f"no answer from another process within --dist_timeout {timeout} s: it is stopped, too slow or cut off"
        ) from error


@contextmanager
def rank_log(run_dir: Path) -> Iterator[None]:
    """What a process of many writes goes to its log; on a node's first process, Python's stderr to the console, too.

    The error that ends the process goes to its log in full, and to the agent, which tells it to people.
    Ends together with the agent: a process whose agent was killed gets SIGTERM.
    """
    exit_with_parent(signal.SIGTERM)
    path = log_path(run_dir, int(os.environ["RANK"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    console = os.fdopen(os.dup(2), "w", buffering=1)
    log = path.open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = log, _Both(log, console) if get_local_rank() == 0 else log
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # the disk may be full
            traceback.print_exc(file=log)
        get_error_handler().record_exception(error)
        raise ReportedError from error


def exit_process(status: int) -> NoReturn:
    """Leave with that exit status.

    A process of many does so without Python's shutting down, during which threads of the communication libraries may
    abort the process although all its work is done.
    """
    if is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Both:
    """Text to two files; not a terminal, so that progress comes in lines."""

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
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Number of this process among all of the run."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_distributed() else 1


def get_num_nodes() -> int:
    """Number of nodes of the run."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_worker() else 1


def is_rank_zero() -> bool:
    """Whether this process writes the run's folder and talks."""
    return get_rank() == 0


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place; every process gets it."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_sums(sums: Sums) -> Sums:
    """Sums over all processes, float64: one reduction for all names, which must be the same everywhere."""
    if not is_distributed() or not sums:
        return sums
    values = all_reduce_sum(torch.stack([value.detach().double() for value in sums.values()]))
    return dict(zip(sums, values, strict=True))


def is_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; every process gets the same answer."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: object) -> list:
    """`value` of every process, by rank; any picklable object."""
    if not is_distributed():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: object) -> object:
    """The first process's `value`, in every process; any picklable object."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]
