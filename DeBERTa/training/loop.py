"""The training loop: batches in order, a step each, and what is logged, saved and evaluated on the way."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.data.dataset import EvaluationBatches, TrainingBatches, load_batches, step_seed
from DeBERTa.training.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.metrics import MetricsLog, Progress, Sums, add, describe, mean_losses
from DeBERTa.training.steps import TrainingStep


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class Run:
    """All that a training run is made of."""

    config: TrainConfig
    model: nn.Module
    training: TrainingStep
    train_batches: TrainingBatches
    evaluation: dict[str, EvaluationBatches]  # by split

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def resume(run: Run) -> int:
    """Load the newest checkpoint of the run's folder, if any; returns the number of updates done."""
    steps = saved_steps(run.run_dir)
    if steps:
        load_checkpoint(run.run_dir, steps[-1], run.model, run.training)
    return steps[-1] if steps else 0


def train(run: Run, first_step: int) -> None:
    """Train from update `first_step` to the end.

    Writes `metrics.jsonl` after the first step and every `log_interval`, and a checkpoint followed by an evaluation
    every `dump_interval` steps and at the end. Raises `NotFiniteError` when a logged loss is not finite.
    """
    config, training = run.config, run.training
    total_steps = training.total_steps
    log = MetricsLog(run.run_dir / "metrics.jsonl", first_step)
    progress = Progress(first_step, total_steps)
    batches = load_batches(run.train_batches, range(first_step, total_steps), config.workers)
    interval, interval_started, tokens = {}, time.monotonic(), 0
    run.model.train()
    try:
        for step, batch in enumerate(batches, start=first_step + 1):
            torch.manual_seed(step_seed(config.seed, step, run.train_batches.plan.rank))
            factor = training.learning_rate(step)
            accumulate(interval, training(batch))
            tokens += batch.real_tokens
            progress.advance()

            if step == first_step + 1 or step % config.log_interval == 0 or step == total_steps:
                metrics = mean_losses(interval)
                check_finite(metrics, step)
                seconds = time.monotonic() - interval_started
                metrics |= {"learning_rate": config.learning_rate * factor, "tokens_per_second": tokens / seconds}
                log.write(step, "train", metrics)
                progress.show(step, metrics)
                interval, interval_started, tokens = {}, time.monotonic(), 0

            if step % config.dump_interval == 0 or step == total_steps:
                paused = time.monotonic()
                saved = save_checkpoint(run.run_dir, step, run.model, training, config.keep_last)
                progress.say(f"step {step}: saved {saved}")
                validation = {"valid": run.evaluation["valid"]} if "valid" in run.evaluation else {}
                for split, metrics in evaluate_splits(
                    run.model, validation, config, training.precision, training.device
                ).items():
                    log.write(step, split, metrics)
                    progress.say(f"step {step}: {split}  {describe(metrics)}")
                interval_started += time.monotonic() - paused
    finally:
        progress.close()
        log.close()


def accumulate(interval: Sums, sums: Sums) -> None:
    """Add a step's sums to the interval's; of gradient norms the last one stands."""
    norms = {name: value for name, value in sums.items() if name.endswith("grad_norm")}
    add(interval, {name: value for name, value in sums.items() if name not in norms})
    interval |= norms


def check_finite(metrics: dict, step: int) -> None:
    for name, value in metrics.items():
        if name.endswith("loss") and not np.isfinite(value):
            raise NotFiniteError(
                f"step {step}: {name} is {value}; lower --learning_rate or raise --warmup, "
                "and start again: training goes on from the last checkpoint"
            )
