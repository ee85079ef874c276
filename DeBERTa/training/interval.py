"""What is summed up between two lines of `metrics.jsonl`."""

import time

import torch

from DeBERTa.training.distributed import all_reduce_sum, all_reduce_sums, get_rank, get_world_size
from DeBERTa.training.metrics import Sums, add, mean_losses


class Interval:
    """Sums since the last line, in float64, so that a run that goes on in between logs the same numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: Sums = {}  # of this process
        self.norms: Sums = {}  # of the last step; the same in every process
        self.tokens = 0  # of this process
        self.started = time.monotonic()

    def add(self, sums: Sums, tokens: int, finite: bool) -> None:
        """A step's sums and real tokens. Of gradient norms the last one stands; without `finite` no loss counts."""
        norms = {name: value for name, value in sums.items() if name.endswith("grad_norm")}
        if finite:
            add(
                self.sums,
                {name: value.detach().double() for name, value in sums.items() if name not in norms},
            )
        self.norms |= norms
        self.tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Means over the interval and all processes. Called in every process."""
        tokens = float(all_reduce_sum(torch.tensor(self.tokens, dtype=torch.float64, device=self.device)))
        sums = all_reduce_sums(self.sums) | self.norms
        seconds = time.monotonic() - self.started
        return (mean_losses(sums) if sums else {}) | {"tokens_per_second": tokens / seconds}

    def state_dict(self) -> dict:
        """Called in every process; each gets the sums of all, float64 [processes, names]."""
        table = torch.zeros(get_world_size(), len(self.sums), dtype=torch.float64, device=self.device)
        if self.sums:
            table[get_rank()] = torch.stack(list(self.sums.values()))
        return {"names": list(self.sums), "sums": all_reduce_sum(table), "norms": dict(self.norms)}

    def load_state_dict(self, state: dict) -> None:
        """Take this process's part; with another number of processes than before the first one takes all."""
        table = state["sums"].to(self.device)
        if len(table) != get_world_size():
            table = torch.cat(
                [table.sum(0, keepdim=True), table.new_zeros(get_world_size() - 1, table.size(1))]
            )
        self.sums = dict(zip(state["names"], table[get_rank()], strict=True))
        self.norms = {name: norm.to(self.device) for name, norm in state["norms"].items()}
