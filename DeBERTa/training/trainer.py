"""Training loop: step, log, save, evaluate and stop, in this order."""

import logging
import math
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from DeBERTa import __version__
from DeBERTa.config import TrainConfig, read_json
from DeBERTa.data.dataset import EvaluationBatches, TrainingBatches, derive_step_seed
from DeBERTa.data.loader import load_batches
from DeBERTa.errors import DamagedCheckpointError, NonFiniteError
from DeBERTa.hub.published import LoadedWeights
from DeBERTa.log import log_regularly
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.report.page import update_report
from DeBERTa.training.checkpoint import (
    Saver,
    Snapshot,
    find_best,
    get_checkpoint_path,
    read_model,
    read_training,
    record_best,
)
from DeBERTa.training.distributed import broadcast_value, get_world_size, is_rank_zero
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.interval import Interval
from DeBERTa.training.metrics import (
    Metrics,
    MetricsLog,
    Progress,
    format_metrics,
    measure_peak_memory,
    move_previous_lines,
    warn_of_undefined,
)
from DeBERTa.training.parallel import all_gather_full, gather_to_rank_zero, load_full_weights
from DeBERTa.training.run_lock import RunLock
from DeBERTa.training.samples import write_samples
from DeBERTa.training.signals import RunInterrupted, Signals
from DeBERTa.training.steps import TrainingStep

logger = logging.getLogger(__name__)

# The evaluations to remember, and their texts in the settings.
TEXTS = {"valid": "valid", "replay": "replay_valid"}
MAX_FORGETTING = 0.05  # relative increase of a loss on the text of --replay that is reported
MAX_LINES_SHOWN = 16  # of a batch whose update was skipped
START_OVER = "start over with a lower --learning_rate or a longer --warmup under another --tag"


@dataclass
class Run:
    """Components of a training run."""

    config: TrainConfig
    model: MaskedLanguageModel | RTDModel
    training: TrainingStep
    train_batches: TrainingBatches
    evaluation: dict[str, EvaluationBatches]  # by split
    settings: dict  # as resolved: "train", "model", "data"
    interval: Interval
    attention: str  # in use
    initial_weights: dict[str, LoadedWeights] = field(default_factory=dict)  # of --init_*, by model
    notes: list[str] = field(default_factory=list)  # on settings that are not what one may expect
    lock: RunLock | None = None  # of the run directory, held by rank 0
    elapsed_seconds: float = 0.0  # training time before this process, on rank 0

    @property
    def run_dir(self) -> Path:
        """Return the run directory."""
        return self.config.run_dir

    def check_lock(self) -> None:
        """Raise `StorageError` on rank 0 if the run directory may be another run's."""
        if self.lock:
            self.lock.check()


class Trainer:
    """Loop over the steps of a run, with its metrics, checkpoints and evaluations."""

    def __init__(self, run: Run, first_step: int, signals: Signals) -> None:
        """Train `run` from the state after `first_step` updates.

        `signals` may end the run or request a checkpoint.
        """
        self.run, self.signals = run, signals
        self.first_step = self.saved_step = first_step
        self.total_steps = run.training.total_steps
        self.progress = Progress(first_step, self.total_steps)
        self.saver = Saver(run.run_dir, run.config.keep_last, run.check_lock)
        self.samples = run.run_dir / "samples.jsonl"
        if not first_step and is_rank_zero():
            move_previous_lines(self.samples)
        texts = {split: run.settings["validation"][f"{name}_sha256"] for split, name in TEXTS.items()}
        path = run.run_dir / "metrics.jsonl"
        self.log = MetricsLog(path, first_step, texts, run.elapsed_seconds, is_rank_zero())

    def train(self) -> None:
        """Train to the last step.

        `metrics.jsonl` gets a line after the first step, every `log_interval` steps and where one is due. A
        checkpoint followed by an evaluation is due every `dump_interval` steps and after the last one.
        Raises `NonFiniteError` when training diverged, `StorageError` when the disk is full, and
        `RunInterrupted` after a signal; the checkpoints on disk stay valid.
        """
        run, config, training, interval = self.run, self.run.config, self.run.training, self.run.interval
        with (
            self.signals.defer_stop(),
            closing(self.progress.bar),
            closing(self.saver),
            log_regularly(lambda: f"step {self.progress.step}/{self.total_steps} is done"),
        ):
            self.evaluate_if_missed()
            batches = load_batches(
                run.train_batches, range(self.first_step, self.total_steps), config.workers
            )
            interval.started = time.monotonic()
            run.model.train()
            step = self.first_step
            for step, batch in enumerate(self.signals.limit_waits(batches), start=self.first_step + 1):
                torch.manual_seed(derive_step_seed(config.seed, step, run.train_batches.plan.rank))
                training.set_learning_rate(step)
                interval.add(training(batch), batch.real_tokens, training.guard.has_finite_losses())
                self.report_skipped_update(step)
                self.progress.advance()

                stop_signal, is_save_requested = self.signals.exchange_requests()
                is_due = step % config.dump_interval == 0 or step == self.total_steps
                if is_due or step == 1 or step % config.log_interval == 0:
                    self.write_metrics(step)
                if is_due or is_save_requested or stop_signal:
                    self.save(step)
                if stop_signal:
                    break
                if is_due:
                    self.evaluate(step)
                self.report_saved(self.saver.check())
            if self.saved_step < step:  # stopped while it waited for a batch
                self.save(step)
            self.report_saved(self.saver.wait())
            # Also for a signal that came while the last checkpoint was written. No rank exits before rank 0
            # has saved: that would end rank 0, too.
            stop_signal, _ = self.signals.exchange_requests()
            if stop_signal:
                raise RunInterrupted(stop_signal)

    def write_metrics(self, step: int) -> None:
        """Log the interval that ends at `step`.

        Collective: every rank calls it.
        """
        training = self.run.training
        self.run.check_lock()
        metrics = self.run.interval.finish()
        optimizers = list(training.optimizers.values())
        metrics["learning_rate"] = optimizers[0].param_groups[0]["lr"]  # of the model or the generator
        if self.run.config.task_name == "RTD":
            metrics["discriminator_learning_rate"] = optimizers[-1].param_groups[-1]["lr"]
        metrics["skipped_steps"] = training.guard.skipped_steps
        metrics["peak_memory_gb"] = round(measure_peak_memory(training.device), 3)
        self.log.write(step, "train", metrics)
        warn_of_undefined(metrics, f"step {step}")
        self.progress.show(metrics)

    def report_skipped_update(self, step: int) -> None:
        """Log spikes and a skipped update.

        Raises `NonFiniteError` after `max_skipped_steps` consecutive ones.
        """
        guard, run = self.run.training.guard, self.run
        for spike in guard.spikes:
            name, loss, mean, sigma = spike
            more = {"mean": mean, "sigma": sigma, "skipped": guard.is_skipped}
            self.log.write(step, "spike", {name: loss, **more})
            logger.info("step %d: spike: %s %.4g after %.4g ± %.2g", step, name, loss, mean, sigma)
        if guard.is_skipped:
            logger.info("step %d: update skipped: %s", step, guard.describe_skip())
        if guard.consecutive_skips >= run.config.max_skipped_steps:
            lines = describe_lines(run.train_batches, step - 1)
            raise NonFiniteError(
                f"step {step}: the updates of {guard.consecutive_skips} steps in a row were skipped "
                f"(--max_skipped_steps): {guard.describe_skip()} on {lines}; look at these lines, or "
                f"{START_OVER} (the checkpoints in {run.run_dir} are older)"
            )

    def save(self, step: int) -> None:
        """Copy the state after `step` updates, and start writing it.

        Collective: every rank calls it.
        """
        self.saved_step = step
        check_finite_weights(self.run.model, step, self.run.run_dir)
        self.report_saved(self.saver.wait())  # first: one copy at a time in memory
        snapshot = take_snapshot(self.run, step)
        if snapshot:
            snapshot.state["elapsed_seconds"] = self.log.elapsed_seconds
            self.log.sync()
            self.saver.save(snapshot, best=find_best(self.run.run_dir, self.log.evaluations["valid"]))

    def report_saved(self, checkpoint: Path | None) -> None:
        """Log that a checkpoint is complete, and record the best one."""
        if checkpoint:
            logger.info("saved %s", checkpoint)
            self.run.check_lock()
            record_best(self.run.run_dir, self.log.evaluations["valid"])

    def evaluate(self, step: int, wanted: Collection[str] = ("valid", "replay")) -> None:
        """Evaluate on the `wanted` splits that are there.

        They are the validation split, and that of the text of `--replay`. A stop signal interrupts the
        evaluation at once.
        """
        run = self.run
        splits = {name: part for name, part in run.evaluation.items() if name in wanted}
        with self.signals.allow_stop():
            results = evaluate_splits(run.training, splits)
        run.check_lock()
        for split, metrics in results.items():
            self.log.write(step, split, metrics)
            logger.info("step %d: %s  %s", step, split, format_metrics(metrics))
        if "replay" in results:
            first = next(iter(self.log.evaluations["replay"].values()), {})
            warn_of_forgetting(step, first, results["replay"])
        if "valid" in splits:
            write_samples(self.samples, step, run.training, splits["valid"])
        if is_rank_zero():
            update_report(run.run_dir)
        run.interval.started = time.monotonic()

    def evaluate_if_missed(self) -> None:
        """Evaluate the resumed checkpoint if the run stopped before its evaluation.

        It is also evaluated where the text to evaluate on has changed since. With `--replay`, evaluate also
        before the first step, to compare with later.
        """
        step, run = self.first_step, self.run
        if not step and "replay" in run.evaluation:
            self.evaluate(0)
        is_usual = step % run.config.dump_interval == 0 or step == self.total_steps
        there = [split for split in self.log.evaluations if split in run.evaluation]
        is_due = step and (is_usual or (there and broadcast_value(self.log.has_other_texts)))
        missing = broadcast_value([split for split in there if step not in self.log.evaluations[split]])
        if is_due and (missing or not there):
            self.evaluate(step, missing)
        if is_rank_zero():
            record_best(run.run_dir, self.log.evaluations["valid"])


def describe_lines(batches: TrainingBatches, step: int) -> str:
    """Return the first lines of the global batch of `step`, by file, numbered from 1."""
    described = []
    own, replayed = batches.select_global_lines(step)
    for file, lines in (("train.txt", own), ("train.txt of --replay", replayed)):
        if len(lines):
            shown = ", ".join(str(line + 1) for line in lines[:MAX_LINES_SHOWN])
            described.append(f"lines {shown}{', ...' * (len(lines) > MAX_LINES_SHOWN)} of {file}")
    return " and ".join(described)


def warn_of_forgetting(step: int, before: Metrics, now: Metrics) -> None:
    """Log a warning if a loss on the text of `--replay` rose above its first one."""
    for name in ("loss", "generator_loss", "discriminator_loss"):
        first, last = before.get(name), now.get(name)
        if first and last and last > (1 + MAX_FORGETTING) * first:
            logger.warning(
                "step %d: %s on the text of --replay is %.4f, %.0f %% above the %.4f it was at first: the "
                "model forgets; a larger --replay_share or a lower --learning_rate may help",
                step, name, last, 100 * (last / first - 1), first,
            )  # fmt: skip


def check_finite_weights(model: nn.Module, step: int, run_dir: Path) -> None:
    """Raise `NonFiniteError` naming the first parameter that is not finite.

    Collective: every rank calls it.
    """
    parameters = dict(model.named_parameters())
    norms = [all_gather_full(torch.linalg.vector_norm(p.detach())) for p in parameters.values()]
    for name, norm in zip(parameters, torch.stack(norms).tolist(), strict=True):
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"step {step}: the norm of {name} is {norm}: training has diverged; {START_OVER} "
                f"(the checkpoints in {run_dir} are older)"
            )


def resume(run: Run, step: int) -> None:
    """Load the checkpoint of `step`: weights, optimizer state, interval sums.

    Rank 0 reads it: nodes may have separate disks.
    """
    weights, state, path = None, {"training": None, "interval": None}, get_checkpoint_path(run.run_dir, step)
    if is_rank_zero():
        weights = read_model(run.run_dir, step, run.model)
        state = read_training(run.run_dir, step)
        # Older checkpoints lack it.
        run.elapsed_seconds = read_json(path / "state.json").get("elapsed_seconds", 0.0)
    load_full_weights(run.model, weights)
    try:
        run.training.load_state_dict(state["training"])
        run.interval.load_state_dict(broadcast_value(state["interval"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{path / 'optimizer.pt'} has another content than this version writes ({type(error).__name__}: "
            f"{error}); resume with the version that wrote it"
        ) from error


def take_snapshot(run: Run, step: int) -> Snapshot | None:
    """Copy the state after `step` updates to rank 0's host memory.

    Collective: every rank calls it. Ranks other than 0 receive None.
    """
    weights = gather_to_rank_zero(run.model.state_dict())
    training = run.training.state_dict()
    interval = gather_to_rank_zero(run.interval.state_dict())
    if not is_rank_zero():
        return None
    batches = run.train_batches
    epoch, position = divmod(batches.count_own_rows(step), len(batches.store))
    state = {
        "step": step,
        "seed": run.config.seed,
        "epoch": epoch,
        "lines_into_epoch": position,
        "processes": get_world_size(),
        "skipped_steps": run.training.guard.skipped_steps,
        "torch": torch.__version__,
        "deberta": __version__,
    }
    return Snapshot(step, weights, {"training": training, "interval": interval}, state, run.settings)
