"""The training loop: batches in order, a step each, and what is logged, saved and evaluated on the way."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.data.dataset import EvaluationBatches, TrainingBatches, load_batches, step_seed
from DeBERTa.training.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.metrics import MetricsLog, Progress, Sums, add, describe, mean_losses
from DeBERTa.training.steps import TrainingStep


class NotFiniteError(RuntimeError):
    """A loss or a weight became NaN or infinite."""


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

    Writes `metrics.jsonl` after the first step, every `log_interval` and at checkpoints; a checkpoint followed by an
    evaluation every `dump_interval` steps and at the end. Raises `NotFiniteError` when the loss of such an interval or
    a weight to be saved is not finite: what is on disk stays good.
    """
    config, training = run.config, run.training
    total_steps = training.total_steps
    log = MetricsLog(run.run_dir / "metrics.jsonl", first_step)
    progress = Progress(first_step, total_steps)
    batches = load_batches(run.train_batches, range(first_step, total_steps), config.workers)
    try:
        if first_step and not log.has(first_step, "valid"):  # stopped between the checkpoint and its evaluation
            validate(run, first_step, log, progress)
        interval, interval_started, tokens = {}, time.monotonic(), 0
        run.model.train()
        for step, batch in enumerate(batches, start=first_step + 1):
            torch.manual_seed(step_seed(config.seed, step, run.train_batches.plan.rank))
            factor = training.learning_rate(step)
            accumulate(interval, training(batch))
            tokens += batch.real_tokens
            progress.advance()

            save = step % config.dump_interval == 0 or step == total_steps
            if save or step == 1 or step % config.log_interval == 0:
                metrics = mean_losses(interval)
                check_finite({k: v for k, v in metrics.items() if k.endswith("loss")}, step, run.run_dir)
                seconds = time.monotonic() - interval_started
                metrics |= {"learning_rate": config.learning_rate * factor, "tokens_per_second": tokens / seconds}
                log.write(step, "train", metrics)
                progress.show(step, metrics)
                interval, interval_started, tokens = {}, time.monotonic(), 0
            if save:
                check_finite(weight_norms(run.model), step, run.run_dir)
                saved = save_checkpoint(run.run_dir, step, run.model, training, config.keep_last)
                progress.say(f"step {step}: saved {saved}")
                validate(run, step, log, progress)
                interval_started = time.monotonic()
    finally:
        progress.close()
        log.close()


def validate(run: Run, step: int, log: MetricsLog, progress: Progress) -> None:
    """Evaluate on the validation split, if there is one, and log it under `step`."""
    splits = {"valid": run.evaluation["valid"]} if "valid" in run.evaluation else {}
    training = run.training
    for split, metrics in evaluate_splits(run.model, splits, run.config, training.precision, training.device).items():
        log.write(step, split, metrics)
        progress.say(f"step {step}: {split}  {describe(metrics)}")


def accumulate(interval: Sums, sums: Sums) -> None:
    """Add a step's sums to the interval's; of gradient norms the last one stands."""
    norms = {name: value for name, value in sums.items() if name.endswith("grad_norm")}
    add(interval, {name: value for name, value in sums.items() if name not in norms})
    interval |= norms


def weight_norms(model: nn.Module) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    norms = torch.stack(torch._foreach_norm([p.detach() for p in parameters.values()])).tolist()
    return dict(zip(parameters, norms, strict=True))


def check_finite(values: dict[str, float], step: int, run_dir: Path) -> None:
    """Raise `NotFiniteError` naming the first of `values` that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                f"step {step}: {name} is {value}, training has diverged; start anew with a lower --learning_rate or a "
                f"longer --warmup under another --tag (the checkpoints in {run_dir} are from before)"
            )
