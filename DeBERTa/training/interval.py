"""Sums between two "train" lines of `metrics.jsonl`, and the tokens seen so far."""

import time

import torch

from DeBERTa.training.distributed import all_reduce_sum, all_reduce_sums, get_rank, get_world_size
from DeBERTa.training.metrics import Metrics, Sums, add, average_losses


class Interval:
    """Sums since the last "train" line.

    They are in float64, so that a run resumed in between logs the same values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens_seen = 0  # on all ranks since the start of the run, without those of this interval
        self.clear()

    def clear(self) -> None:
        """Start the next interval."""
        self.sums: Sums = {}  # of this rank
        self.norms: Sums = {}  # of the last step; the same on all ranks
        self.tokens = 0  # of this rank
        self.started = time.monotonic()  # start of the speed measurement

    def add(self, sums: Sums, tokens: int, is_finite: bool) -> None:
        """Add a step's sums and real tokens.

        Losses are added only if `is_finite`. Of the gradient norms, those of the last step are stored:
        a step without an update of the discriminator has none of it.
        """
        norms = {name: value for name, value in sums.items() if name.endswith("grad_norm")}
        self.norms = norms
        if is_finite:
            add(self.sums, {name: sums[name].detach().double() for name in sums if name not in norms})
        self.tokens += tokens

    def finish(self) -> Metrics:
        """Return means over the interval and all ranks, and start the next one.

        Collective: every rank calls it.
        """
        tokens = self._count_tokens()
        self.tokens_seen += tokens
        sums = all_reduce_sums(self.sums) | self.norms
        rate = tokens / (time.monotonic() - self.started)
        metrics = average_losses(sums) if sums else {}
        self.clear()
        return metrics | {"tokens_per_second": rate, "tokens_seen": self.tokens_seen}

    def _count_tokens(self) -> int:
        """Return the tokens of this interval on all ranks."""
        return int(all_reduce_sum(torch.tensor(self.tokens, dtype=torch.float64, device=self.device)))

    def state_dict(self) -> dict:
        """Return the sums of all ranks, float64 [ranks, names].

        Collective: every rank calls it.
        """
        table = torch.zeros(get_world_size(), len(self.sums), dtype=torch.float64, device=self.device)
        if self.sums:
            table[get_rank()] = torch.stack(list(self.sums.values()))
        return {
            "names": list(self.sums),
            "sums": all_reduce_sum(table),
            "norms": dict(self.norms),
            "tokens_seen": self.tokens_seen + self._count_tokens(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore this rank's row of the state that `state_dict` returned.

        With another number of ranks than before, rank 0 takes the sum of all rows.
        """
        table = torch.as_tensor(state["sums"], dtype=torch.float64, device=self.device)
        if len(table) != get_world_size():
            others = table.new_zeros(get_world_size() - 1, table.size(1))
            table = torch.cat([table.sum(0, keepdim=True), others])
        self.sums = dict(zip(state["names"], table[get_rank()], strict=True))
        self.norms = {
            name: torch.as_tensor(norm, device=self.device) for name, norm in state["norms"].items()
        }
        self.tokens_seen = state.get("tokens_seen", 0)  # older checkpoints lack it
