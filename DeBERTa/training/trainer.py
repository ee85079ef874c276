"""The training loop: batches in order, a step each, and what is logged, saved and evaluated on the way."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from DeBERTa import __version__
from DeBERTa.config import TrainConfig
from DeBERTa.data.dataset import EvaluationBatches, TrainingBatches, derive_step_seed, load_batches
from DeBERTa.errors import NonFiniteError
from DeBERTa.training.best import find_best, record_best
from DeBERTa.training.checkpoint import Snapshot, read_model, read_training
from DeBERTa.training.distributed import barrier, broadcast_object, get_world_size, is_any_rank, is_rank_zero
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.interval import Interval
from DeBERTa.training.metrics import MetricsLog, Progress, describe
from DeBERTa.training.parallel import all_gather_full, gather_to_rank_zero, load_full_weights
from DeBERTa.training.saving import Saver
from DeBERTa.training.signals import RunInterrupted, Signals
from DeBERTa.training.steps import TrainingStep

LINES_SHOWN = 16  # of a batch that could not be learnt from


@dataclass
class Run:
    """All that a training run is made of."""

    config: TrainConfig
    model: nn.Module
    training: TrainingStep
    train_batches: TrainingBatches
    evaluation: dict[str, EvaluationBatches]  # by split
    settings: dict  # as resolved: "train", "model", "data"
    interval: Interval

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def resume(run: Run, step: int) -> None:
    """Load the checkpoint of `step`: weights, optimizer state, and the sums of the logging interval.

    Rank 0 reads it: nodes may have separate disks.
    """
    weights, state = None, {"training": None, "interval": None}
    if is_rank_zero():
        weights = read_model(run.run_dir, step, run.model)
        state = read_training(run.run_dir, step)
    load_full_weights(run.model, weights)
    run.training.load_state_dict(state["training"])
    run.interval.load_state_dict(broadcast_object(state["interval"]))


def train(run: Run, first_step: int, signals: Signals) -> None:
    """Train from update `first_step` to the end.

    Writes `metrics.jsonl` after the first step, every `log_interval` and at checkpoints; a checkpoint followed by an
    evaluation every `dump_interval` steps and at the end. Raises `NonFiniteError` after `max_skipped_steps` updates in
    a row that had to be left out or when a weight to be saved is not finite, `StorageError` when the disk is full, and
    `RunInterrupted` after a signal: what is on disk stays good.
    """
    log = MetricsLog(run.run_dir / "metrics.jsonl", first_step, is_rank_zero())
    progress = Progress(first_step, run.training.total_steps, is_rank_zero())
    saver = Saver(run.run_dir, run.config.keep_last)
    with signals.defer_stop():
        try:
            _train(run, first_step, signals, log, progress, saver)
        finally:
            saver.close()
            progress.close()
            log.close()


def _train(
    run: Run, first_step: int, signals: Signals, log: MetricsLog, progress: Progress, saver: Saver
) -> None:
    config, training, interval = run.config, run.training, run.interval
    total_steps = training.total_steps
    if is_rank_zero():
        record_best(run.run_dir, log.evaluations)
    if first_step and (first_step % config.dump_interval == 0 or first_step == total_steps):
        # Stopped between the checkpoint and its evaluation?
        if is_any_rank(is_rank_zero() and not log.has(first_step, "valid"), training.device):
            validate(run, first_step, log, progress, signals)
        if is_rank_zero():
            record_best(run.run_dir, log.evaluations)
    batches = load_batches(run.train_batches, range(first_step, total_steps), config.workers)
    interval.started = time.monotonic()
    run.model.train()
    for step, batch in enumerate(batches, start=first_step + 1):
        torch.manual_seed(derive_step_seed(config.seed, step, run.train_batches.plan.rank))
        factor = training.set_learning_rate(step)
        interval.add(training(batch), batch.real_tokens, training.guard.losses_finite())
        progress.advance()
        report_left_out(run, step, log, progress)

        ending, save = signals.exchange_requests(step, training.device)
        due = step % config.dump_interval == 0 or step == total_steps
        if due or step == 1 or step % config.log_interval == 0:
            metrics = interval.metrics()
            metrics |= {
                "learning_rate": config.learning_rate * factor,
                "skipped_steps": training.guard.skipped,
            }
            log.write(step, "train", metrics)
            progress.show(step, metrics)
            interval.clear()
        if due or save or ending:
            check_finite(weight_norms(run.model), step, run.run_dir)
            snapshot = take_snapshot(run, step)
            if is_rank_zero():
                announce(saver.wait(), run, log, progress)
                log.sync()
                saver.save(snapshot, best=find_best(run.run_dir, log.evaluations))
        if ending:
            announce(saver.wait(), run, log, progress)
            barrier()  # a process that ends before the first one has saved would take it along
            raise RunInterrupted(ending)
        if due:
            validate(run, step, log, progress, signals)
            interval.started = time.monotonic()
        announce(saver.check(), run, log, progress)
    announce(saver.wait(), run, log, progress)
    ending, _ = signals.exchange_requests(0, training.device)  # told while the last checkpoint was written
    if ending:
        raise RunInterrupted(ending)


def take_snapshot(run: Run, step: int) -> Snapshot | None:
    """Copy the state after `step` updates to rank 0's host memory. Called on every rank; others get None."""
    weights = gather_to_rank_zero(run.model.state_dict())
    training = run.training.state_dict()
    interval = gather_to_rank_zero(run.interval.state_dict())
    if not is_rank_zero():
        return None
    lines, batch_size = len(run.train_batches.store), run.config.train_batch_size
    epoch, position = divmod(step * batch_size, lines)
    state = {
        "step": step,
        "seed": run.config.seed,
        "epoch": epoch,
        "lines_into_epoch": position,
        "processes": get_world_size(),
        "skipped_steps": run.training.guard.skipped,
        "torch": torch.__version__,
        "deberta": __version__,
    }
    return Snapshot(
        step,
        weights,
        {"training": training, "interval": interval},
        state,
        run.settings,
    )


def announce(saved: Path | None, run: Run, log: MetricsLog, progress: Progress) -> None:
    """Say that a checkpoint is complete, and which is now the best."""
    if saved:
        progress.say(f"saved {saved}")
        record_best(run.run_dir, log.evaluations)


def validate(run: Run, step: int, log: MetricsLog, progress: Progress, signals: Signals) -> None:
    """Evaluate on the validation split, if there is one, and log it under `step`. A signal ends it at once."""
    splits = {"valid": run.evaluation["valid"]} if "valid" in run.evaluation else {}
    training = run.training
    with signals.allow_stop():
        results = evaluate_splits(
            run.model, training.outputs, splits, run.config, training.precision, training.device
        )
    for split, metrics in results.items():
        log.write(step, split, metrics)
        progress.say(f"step {step}: {split}  {describe(metrics)}")


def report_left_out(run: Run, step: int, log: MetricsLog, progress: Progress) -> None:
    """Tell of spikes and of an update left out. Raises `NonFiniteError` when there were too many in a row."""
    stability = run.training.guard
    for spike in stability.spikes:
        values = {"mean": spike.mean, "sigma": spike.sigma, "left_out": stability.left_out}
        log.write(step, "spike", {spike.name: spike.loss, **values})
        progress.say(
            f"step {step}: {spike.name} {spike.loss:.4g} is a spike, {spike.mean:.4g} ± {spike.sigma:.2g} before it"
        )
    if not stability.left_out:
        return
    broken = [f"{name} is {loss}" for name, loss in stability.losses.items() if not math.isfinite(loss)]
    losses = ", ".join(f"{name} {loss:.4g}" for name, loss in stability.losses.items())
    if broken:
        reason = ", ".join(broken)
    else:
        reason = f"a loss spike ({losses})" if stability.spikes else f"the gradient is not finite ({losses})"
    progress.say(f"step {step}: update left out: {reason}")
    if stability.in_a_row < run.config.max_skipped_steps:
        return
    lines = (run.train_batches.select_global_lines(step - 1) + 1).tolist()
    more = f" and {len(lines) - LINES_SHOWN} more" if len(lines) > LINES_SHOWN else ""
    raise NonFiniteError(
        f"step {step}: the updates of {stability.in_a_row} steps in a row were left out (--max_skipped_steps): "
        f"{reason} on lines {', '.join(map(str, lines[:LINES_SHOWN]))}{more} of train.txt; look at these lines, or "
        "start anew with a lower --learning_rate or a longer --warmup under another --tag "
        f"(the checkpoints in {run.run_dir} hold the weights from before)"
    )


def weight_norms(model: nn.Module) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    norms = torch._foreach_norm([p.detach() for p in parameters.values()])
    norms = torch.stack([all_gather_full(norm) for norm in norms]).tolist()
    return dict(zip(parameters, norms, strict=True))


def check_finite(values: dict[str, float], step: int, run_dir: Path) -> None:
    """Raise `NonFiniteError` naming the first of `values` that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"step {step}: {name} is {value}, training has diverged; start anew with a lower --learning_rate or a "
                f"longer --warmup under another --tag (the checkpoints in {run_dir} are from before)"
            )
