"""Skipped updates: non-finite losses or gradients, and spikes (`--skip_spikes`).

The decision comes before the optimizer's step and is the same on every rank, so that a skipped update
leaves weights and moments unchanged on all ranks. It synchronizes with the device once per update.
"""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from DeBERTa.config import TrainConfig
from DeBERTa.training.distributed import all_reduce_sum
from DeBERTa.training.metrics import Sums

WINDOW = 128  # losses that a spike is measured against
MIN_WINDOW = 32  # losses needed before any can be a spike
SIGMAS = 6.0


class Spike(NamedTuple):
    """A loss (nats per target) far above the mean of the losses before it."""

    name: str
    loss: float
    mean: float
    sigma: float


class UpdateGuard:
    """Decision whether to take or skip an update.

    Its state is part of every checkpoint.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.skip_spikes, self.device = config.skip_spikes, device
        self.windows: dict[str, deque[float]] = {}  # by loss name, the last finite ones
        self.skipped_steps = 0  # steps with a skipped update, since the start of the run
        self.consecutive_skips = 0
        self.begin_step()

    def begin_step(self) -> None:
        """Clear the losses and spikes of the previous step."""
        self.losses: dict[str, float] = {}  # of this step, over all ranks, nats per target
        self.spikes: list[Spike] = []
        self.is_skipped = False

    def allows_update(self, sums: Sums, names: tuple[str, ...], norm: torch.Tensor) -> bool:
        """Return whether to take an update with this gradient norm.

        The result is the same on all ranks. `names` are the losses in `sums` that the update minimizes. Once
        an update is skipped, all later ones of the same step are skipped, too.
        """
        columns = [~torch.isfinite(norm), *(sums[name] for name in names)]
        columns += [sums[name.replace("loss", "targets")] for name in names]
        totals = all_reduce_sum(torch.stack([column.double() for column in columns])).tolist()
        is_finite, losses, targets = not totals[0], totals[1 : len(names) + 1], totals[len(names) + 1 :]
        for name, loss, count in zip(names, losses, targets, strict=True):
            if count:
                self.losses[name] = loss / count
                self._detect_spike(name, loss / count)
        is_finite &= self.has_finite_losses()
        if not is_finite or (self.spikes and self.skip_spikes):
            self.is_skipped = True
        return not self.is_skipped

    def _detect_spike(self, name: str, loss: float) -> None:
        """Compare a loss with its window, then add it.

        A lasting rise is thus a spike for a few steps only.
        """
        if not math.isfinite(loss):
            return
        window = self.windows.setdefault(name, deque(maxlen=WINDOW))
        if len(window) >= MIN_WINDOW:
            mean, sigma = float(np.mean(window)), float(np.std(window))
            if loss > mean + SIGMAS * sigma:
                self.spikes.append(Spike(name, loss, mean, sigma))
        window.append(loss)

    def end_step(self) -> None:
        """Count the step if its update was skipped."""
        self.consecutive_skips = self.consecutive_skips + 1 if self.is_skipped else 0
        self.skipped_steps += self.is_skipped

    def has_finite_losses(self) -> bool:
        """Return whether this step's losses are finite and can enter a mean."""
        return all(map(math.isfinite, self.losses.values()))

    def describe_skip(self) -> str:
        """Return why this step's update was skipped."""
        if not self.has_finite_losses():
            return ", ".join(f"{n} is {loss}" for n, loss in self.losses.items() if not math.isfinite(loss))
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        return f"a loss spike ({losses})" if self.spikes else f"the gradient is not finite ({losses})"

    def state_dict(self) -> dict:
        """Return the windows and counts, for a checkpoint."""
        windows = {name: list(window) for name, window in self.windows.items()}
        # The names of the checkpoint format: other ones would not resume older runs.
        return {"windows": windows, "skipped": self.skipped_steps, "in_a_row": self.consecutive_skips}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state that `state_dict` returned."""
        self.windows = {name: deque(values, maxlen=WINDOW) for name, values in state["windows"].items()}
        self.skipped_steps, self.consecutive_skips = state["skipped"], state["in_a_row"]
