"""Metrics of a run: `metrics.jsonl`, and the progress on the console."""

import json
import logging
import math
import resource
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from DeBERTa.files import (
    CHUNK_BYTES,
    find_unused_path,
    open_atomic,
    open_regular,
    raise_storage_errors,
    sync,
)
from DeBERTa.report.read import parse_line

logger = logging.getLogger(__name__)

# On the device: losses and counts that add up over micro-batches, steps and ranks.
Sums = dict[str, torch.Tensor]
Metrics = dict[str, float | None]  # None: undefined, because nothing was counted


def add(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums` in place; new names start at zero."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def average_losses(sums: Sums) -> Metrics:
    """Return losses and accuracies per target, or None where there is no target.

    The sums are named `*loss`, `*correct` and `*targets`. Synchronizes with the device once.
    """
    values = dict(zip(sums, torch.stack([v.detach().double() for v in sums.values()]).tolist(), strict=True))
    means: Metrics = {}
    for name, value in values.items():
        kind = name.rpartition("_")[2]
        targets = values[name.removesuffix(kind) + "targets"] if kind in ("loss", "correct") else 1.0
        if kind != "targets":
            means[name.replace("correct", "accuracy")] = value / targets if targets else None
    return means


def replace_non_finite(metrics: Metrics) -> Metrics:
    """Return the metrics with None for NaN and infinity, which JSON does not have."""
    return {n: value if value is not None and math.isfinite(value) else None for n, value in metrics.items()}


def measure_peak_memory(device: torch.device) -> float:
    """Return this rank's peak memory in GB (10^9 bytes).

    It is the memory allocated on the GPU, or the resident memory of the process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsLog:
    """Writer of `metrics.jsonl`, one JSON object per line.

    The kind of a line is "train", "spike" or the evaluated split. The file is opened for every line, so that
    none goes to a file that was removed or replaced.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        texts: dict[str, str | None],
        elapsed_seconds: float = 0.0,
        is_writer: bool = True,
    ) -> None:
        """Create the file, or remove lines after `first_step` that a killed run left.

        Without a checkpoint to resume from, all previous lines move to another file. `texts` holds
        the SHA-256 of the texts to evaluate on, "valid" and "replay", if any. `elapsed_seconds` is the
        training time of the run so far. Only rank 0 is a writer: the lines of other ranks are discarded.
        """
        self._path, self._texts, self._is_writer = path, texts, is_writer
        self._started = time.monotonic() - elapsed_seconds
        self._size = 0  # bytes of the file when a line was written last
        # By split ("replay": that of --replay) and step.
        self.evaluations: dict[str, dict[int, dict]] = {split: {} for split in texts}
        self.has_other_texts = False  # whether the last evaluation was on another text
        if is_writer and not first_step:
            move_previous_lines(path)
        elif is_writer and path.exists():
            self._remove_later_lines(first_step)
        elif is_writer:
            what = "evaluations up to step %d are unknown, and with them the best checkpoint so far"
            logger.warning(f"%s is missing: {what}", path, first_step)
        self._append("")

    def _remove_later_lines(self, first_step: int) -> None:
        damaged, evaluations = 0, []
        with open(self._path, "rb", opener=open_regular) as old, open_atomic(self._path) as new:
            while content := old.readline(CHUNK_BYTES):  # lines of a long run may not fit the memory
                line = content.decode(errors="replace").rstrip("\n")
                values = parse_line(line)
                damaged += values is None
                if values and values["step"] <= first_step:
                    new.write(f"{line}\n".encode())
                    is_evaluation = values.get("kind") in list(self._texts)  # of any type in a damaged line
                    evaluations += [values] if is_evaluation else []
        if damaged:
            logger.warning("%s: %d damaged lines removed", self._path, damaged)
        for split, text in self._texts.items():
            self.evaluations[split] = there = select_evaluations(evaluations, split, text)
            last = next((values for values in reversed(evaluations) if values["kind"] == split), None)
            self.has_other_texts |= last is not None and there.get(last["step"]) != last

    def _append(self, text: str) -> None:
        if self._is_writer:
            with raise_storage_errors(self._path), open(self._path, "a", opener=open_regular) as file:
                file.write(text)
                self._size = file.tell()

    @property
    def elapsed_seconds(self) -> float:
        """Return the training time of the run so far, earlier processes included."""
        return round(time.monotonic() - self._started, 3)

    def write(self, step: int, kind: str, values: Metrics) -> None:
        """Add a line with the time.

        Values that are undefined or not finite become null. Raises `StorageError`.
        """
        finite = replace_non_finite(values)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"step": step, "kind": kind, "time": now, "elapsed_seconds": self.elapsed_seconds, **finite}
        if kind in self._texts:
            self.evaluations[kind][step] = finite
            line["text_sha256"] = self._texts[kind]
        if self._is_writer and (self._path.stat().st_size if self._path.exists() else 0) < self._size:
            message = "%s was removed or truncated during the run: lines from before step %d are missing"
            logger.warning(message, self._path, step)
        self._append(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Flush all lines to the disk.

        Raises `StorageError`.
        """
        if self._is_writer and self._path.exists():
            with raise_storage_errors(self._path):
                sync(self._path)


def move_previous_lines(path: Path) -> None:
    """Move the lines of a run without a checkpoint, if any, to another file."""
    if path.exists() and path.stat().st_size:
        previous = find_unused_path(path)
        path.rename(previous)
        logger.info("no checkpoint to resume from: the previous %s is now %s", path.name, previous)


def select_evaluations(lines: list[dict], split: str, text: str | None) -> dict[int, dict]:
    """Return the evaluations of "valid" or "replay" on one text by step.

    The text is the one with the SHA-256 `text`, or without one, that of the last evaluation. Lines of earlier
    versions do not name it: they belong to the first that is named.
    """
    evaluations = [values for values in lines if values.get("kind") == split]
    named = [values["text_sha256"] for values in evaluations if "text_sha256" in values] or [text]
    selected = text or named[-1]
    return {
        values["step"]: values for values in evaluations if values.get("text_sha256", named[0]) == selected
    }


class Progress:
    """Progress bar on a terminal, else a log line per logging interval."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.first_step, self.total_steps = first_step, total_steps
        self.step = first_step  # completed
        is_hidden = None if logger.isEnabledFor(logging.INFO) else True  # None: hidden unless on a terminal
        steps = {"total": total_steps, "initial": first_step, "unit": "step"}
        self.bar = tqdm(**steps, desc="training", disable=is_hidden, dynamic_ncols=True)
        self._started = time.monotonic()

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        self.bar.update()

    def show(self, metrics: Metrics) -> None:
        """Show the metrics of the interval that ends here, and the time left."""
        text = format_metrics(metrics)
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        seconds_per_step = (time.monotonic() - self._started) / (self.step - self.first_step)
        time_left = tqdm.format_interval(seconds_per_step * (self.total_steps - self.step))
        logger.info("step %d/%d  %s  %s to go", self.step, self.total_steps, text, time_left)


FORMATS = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "perplexity": "perplexity {:.1f}",
    "generator_loss": "generator loss {:.3f}",
    "generator_accuracy": "accuracy {:.1%}",
    "discriminator_loss": "discriminator loss {:.4f}",
    "discriminator_replaced_entropy": "(from the share of replaced tokens alone {:.4f})",
    "discriminator_accuracy": "accuracy {:.1%}",
    "discriminator_majority_accuracy": "(from the majority class alone {:.1%})",
    "discriminator_precision": "precision {:.1%}",
    "discriminator_recall": "recall {:.1%}",
    "discriminator_recall_at_precision_50": "recall at 50% precision {:.1%}",
    "discriminator_auc": "ROC AUC {:.3f}",
    "discriminator_rarity_auc": "(from the rarity of tokens alone {:.3f})",
    "tokens_per_second": "{:,.0f} tokens/s",
    "skipped_steps": "{} steps skipped",
}


CAUSES = {
    "loss": "no token was masked",
    "generator_loss": "no token was masked",
    "discriminator_precision": "no token was classified as replaced",
    "discriminator_recall": "no token was replaced",
}


def format_metrics(metrics: Metrics) -> str:
    """Return the main metrics on one line.

    Skipped steps are included only if there are any.
    """
    shown = {name: value for name, value in metrics.items() if name != "skipped_steps" or value}
    return "  ".join(
        form.partition("{")[0] + "undefined" if shown[name] is None else form.format(shown[name])
        for name, form in FORMATS.items()
        if name in shown
    )


def warn_of_undefined(metrics: Metrics, where: str) -> None:
    """Log a warning that says which metrics are undefined and why, if any."""
    causes = [f"{name} is undefined: {CAUSES[name]}" for name in CAUSES if metrics.get(name, 0.0) is None]
    if causes:
        logger.warning("%s: %s", where, "; ".join(causes))
