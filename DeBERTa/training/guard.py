"""Updates that are left out: losses or gradients that are not finite, and with `--skip_spikes` sudden losses.

The decision is taken before the optimiser's step and is the same in every process, so that weights and moments stay as
they are everywhere. It reads the device once an update.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from DeBERTa.config import TrainConfig
from DeBERTa.training.distributed import all_reduce_sum
from DeBERTa.training.metrics import Sums

WINDOW = 128  # losses a spike is measured against
FEWEST = 32  # losses seen before any can be called a spike
SIGMAS = 6.0


@dataclass(frozen=True)
class Spike:
    """A loss (nats a target) far above the mean of those before."""

    name: str
    loss: float
    mean: float
    sigma: float


class Stability:
    """What became of the updates so far; part of every checkpoint."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.skip_spikes, self.device = config.skip_spikes, device
        self.windows: dict[str, deque[float]] = {}  # by loss, the last finite ones
        self.skipped = 0  # steps with an update left out, since the start of the run
        self.in_a_row = 0
        self.begin_step()

    def begin_step(self) -> None:
        self.losses: dict[str, float] = {}  # of this step, over all processes, nats a target
        self.spikes: list[Spike] = []
        self.left_out = False

    def allows(self, sums: Sums, names: tuple[str, ...], norm: torch.Tensor) -> bool:
        """Whether to take the update with gradient `norm` and the losses `names` of `sums`; the same in all processes.

        After one refusal in a step all its later updates are refused too.
        """
        numbers = [(~torch.isfinite(norm)).double()]
        for name in names:
            numbers += [sums[name].double(), sums[name.replace("loss", "targets")].double()]
        broken, *pairs = all_reduce_sum(torch.stack(numbers)).tolist()
        for name, loss, targets in zip(names, pairs[::2], pairs[1::2], strict=True):
            self.losses[name] = loss / max(targets, 1)
        spikes = [spike for name in names if (spike := self._watch(name, self.losses[name]))]
        self.spikes += spikes
        finite = broken == 0 and all(math.isfinite(self.losses[name]) for name in names)
        if not finite or (spikes and self.skip_spikes):
            self.left_out = True
        return not self.left_out

    def _watch(self, name: str, loss: float) -> Spike | None:
        """Compare a loss with its window and add it: a lasting change of level is a spike for a few steps only."""
        if not math.isfinite(loss):
            return None
        window = self.windows.setdefault(name, deque(maxlen=WINDOW))
        spike = None
        if len(window) >= FEWEST:
            mean, sigma = float(np.mean(window)), float(np.std(window))
            if loss > mean + SIGMAS * sigma:
                spike = Spike(name, loss, mean, sigma)
        window.append(loss)
        return spike

    def end_step(self) -> None:
        self.in_a_row = self.in_a_row + 1 if self.left_out else 0
        self.skipped += self.left_out

    def losses_finite(self) -> bool:
        """Whether this step's losses can go into a mean."""
        return all(math.isfinite(loss) for loss in self.losses.values())

    def state_dict(self) -> dict:
        windows = {name: list(window) for name, window in self.windows.items()}
        return {"windows": windows, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.windows = {name: deque(values, maxlen=WINDOW) for name, values in state["windows"].items()}
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
