"""Ranks of a run: their process group, reductions and gathers.

Without a process group every function returns the result for a single process, so that callers need no
special case.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from DeBERTa.errors import LaunchError, PeerLostError
from DeBERTa.training.metrics import Sums
from DeBERTa.training.worker import LAUNCHER_PID, RESTART_COUNT, get_local_rank, is_worker

MAX_ELEMENTS = 2**31  # of a vector that another rank announces
# In NCCL's errors about another rank.
PEER = re.compile("remote p|by peer|[Cc]onnection|[Cc]all to connect|[Tt]imed? ?out")
NCCL_ADVICE = {  # by a part of NCCL's last error
    "No space left": "a container needs a larger /dev/shm (docker run --shm-size 1g)",
    "Duplicate GPU": "start one rank per GPU",
    "out of memory": "other processes use this GPU (nvidia-smi)",
}
NCCL_DEBUG = "NCCL_DEBUG=INFO in the environment shows more"
ENDING_SECONDS = 15  # for a rank that lost its peers to end, and for the launchers to end all others


@contextmanager
def join_process_group(timeout: int) -> Iterator[None]:
    """Join the process group in a worker, and destroy it at the end.

    The backend is Gloo between CPUs and NCCL between GPUs. Ranks have `timeout` seconds to join. The timeout
    of collectives is shorter, so that all have ended `timeout` seconds after a rank was lost. Raises
    `PeerLostError` then, and `LaunchError` where this rank has no GPU, or NCCL cannot start.
    """
    if not is_worker() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", get_local_rank())
        if device.index >= (count := torch.cuda.device_count()):  # under torchrun
            raise LaunchError(
                f"local rank {device.index} has no GPU: it sees {count}; start at most as many ranks per "
                "node, each of which sees all GPUs of the node"
            )
        torch.cuda.set_device(device)
    store: dist.Store | None = None  # under torchrun, at MASTER_ADDR:MASTER_PORT
    with translate_peer_errors(timeout):
        if LAUNCHER_PID in os.environ:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, timeout=timedelta(seconds=timeout))
            store = dist.PrefixStore(f"ranks-{os.environ[RESTART_COUNT]}", store)
        with translate_nccl_errors():
            dist.init_process_group(
                backend,
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timedelta(seconds=timeout - min(ENDING_SECONDS, timeout / 3)),
                device_id=device,
            )
        yield
        dist.barrier()  # no rank leaves while another one still writes
    dist.destroy_process_group()


@contextmanager
def translate_nccl_errors() -> Iterator[None]:
    """Raise `LaunchError` where NCCL cannot start on this node.

    Errors about another rank are not changed: that rank has the reason.
    """
    try:
        yield
    except dist.DistBackendError as error:
        text = str(error)
        if "NCCL error" not in text or PEER.search(text):
            raise
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Last error:")]
        reason = lines[-1].strip()
        advice = next((advice for part, advice in NCCL_ADVICE.items() if part in reason), NCCL_DEBUG)
        raise LaunchError(f"NCCL cannot start: {reason}; {advice}") from error


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
            raise PeerLostError("connection to another rank lost: see its log") from error
        raise PeerLostError(
            f"no message from another rank within --dist_timeout {timeout} s: it is stopped, slow or cut off"
        ) from error


def is_distributed() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of ranks of the run."""
    return dist.get_world_size() if is_distributed() else 1


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


def gather_values(value: object) -> list:
    """Return the `value` of every rank, in order of ranks.

    It is sent as JSON: what other machines send is data, never code.
    """
    if not is_distributed():
        return [value]
    text = json.dumps(value, default=torch.Tensor.tolist)
    encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return [json.loads(received.numpy().tobytes()) for received in gather_vectors(encoded)]


def broadcast_value(value: Any) -> Any:
    """Return rank 0's `value` on every rank.

    Other ranks receive what JSON has: lists for tensors and tuples, text for keys.
    """
    received = gather_values(value if is_rank_zero() else None)[0]
    return value if is_rank_zero() else received


def gather_vectors(vector: torch.Tensor) -> list[torch.Tensor]:
    """Return every rank's [N], in host memory.

    The dtype is the same on all ranks, N may differ.
    """
    if not is_distributed():
        return [vector]
    lengths = [torch.tensor(0) for _ in range(get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(vector)))
    longest = max(map(int, lengths))
    if not 0 <= longest <= MAX_ELEMENTS:
        raise PeerLostError(
            f"another rank announced {longest} values: not a rank of this run; use a network of your own"
        )
    padded = vector.new_zeros(longest)
    padded[: len(vector)] = vector
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [values[: int(length)] for values, length in zip(gathered, lengths, strict=True)]
