"""The processes of one run: which of them this is, and what is summed or compared over all of them.

Without a process group every function answers for a single process, so that callers need no special case.
"""

import torch
import torch.distributed as dist

from DeBERTa.training.metrics import Sums


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process among all of the run."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes the run's folder and talks."""
    return rank() == 0


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place; every process gets it."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def total_sums(sums: Sums) -> Sums:
    """Sums over all processes, float64: one reduction for all names, which must be the same everywhere."""
    if not is_distributed() or not sums:
        return sums
    values = total(torch.stack([value.detach().double() for value in sums.values()]))
    return dict(zip(sums, values, strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; every process gets the same answer."""
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()
