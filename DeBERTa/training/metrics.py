"""What a person sees of a run: the console, and `metrics.jsonl` in the run's folder."""

import math
import os
import sys
import time
from pathlib import Path

import torch
import ujson
from tqdm import tqdm

from DeBERTa.data.files import find_unused_path, sync

Sums = dict[str, torch.Tensor]  # numbers that add up over parts and steps, on the device: losses and counts


def add(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums` in place; new names start at zero."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def mean_losses(sums: Sums) -> dict[str, float]:
    """Losses and accuracies per target from sums named `*loss`, `*correct`, `*targets`; reads the device once."""
    values = dict(zip(sums, torch.stack([v.detach().double() for v in sums.values()]).tolist(), strict=True))
    means = {}
    for name, value in values.items():
        if name.endswith("targets"):
            continue
        if name.endswith(("loss", "correct")):
            value /= max(values[name.replace("loss", "targets").replace("correct", "targets")], 1)
        means[name.replace("correct", "accuracy")] = value
    return means


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, with "step" and "kind" ("train", "spike" or the split evaluated)."""

    def __init__(self, path: Path, first_step: int, writes: bool = True) -> None:
        """Lines of steps after `first_step`, left by a run that went on past its last checkpoint, are dropped.

        When there is no checkpoint to go on from, all lines go to a file aside.

        Without `writes`, as in all processes but the first, there is no file and nothing is remembered.
        """
        self._path, self._file = path, None
        self._there: set[tuple[int, str]] = set()
        self.evaluations: dict[int, dict] = {}  # on the validation split, by step
        if not writes:
            return
        kept: list[str] = []
        if path.exists() and path.stat().st_size and first_step == 0:
            aside = find_unused_path(path)
            path.rename(aside)
            print(f"no checkpoint to go on from: the metrics of before are now in {aside}", file=sys.stderr)
        elif path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            sync(temporary)
            temporary.replace(path)
        for line in map(ujson.loads, kept):
            self._remember(line["step"], line["kind"], line)
        self._file = path.open("a", buffering=1)

    def _remember(self, step: int, kind: str, values: dict) -> None:
        self._there.add((step, kind))
        if kind == "valid":
            self.evaluations[step] = values

    def has(self, step: int, kind: str) -> bool:
        """Whether this line was written, by this run or an earlier one."""
        return (step, kind) in self._there

    def write(self, step: int, kind: str, values: dict) -> None:
        """Add a line; what is not finite becomes null, which JSON can say. Raises `OSError` naming the file."""
        if not self._file:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._remember(step, kind, finite)
        try:
            self._file.write(ujson.dumps({"step": step, "kind": kind, **finite}) + "\n")
        except OSError as error:
            error.filename = str(self._path)
            raise

    def sync(self) -> None:
        """Have all lines reach the disk."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for one cut short by a crash."""
    try:
        return ujson.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """One line on the terminal: losses, discriminator accuracy, tokens a second, time to go.

    A terminal gets a bar that is redrawn; a file or pipe gets a line each logging interval. Nobody hears anything
    without `speaks`, as in all processes but the first.
    """

    def __init__(self, first_step: int, total_steps: int, speaks: bool = True) -> None:
        self.first_step, self.total_steps, self.speaks = first_step, total_steps, speaks
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=None if speaks else True,
            dynamic_ncols=True,
        )
        self._started = time.monotonic()

    def advance(self) -> None:
        self.bar.update()

    def show(self, step: int, metrics: dict) -> None:
        """`metrics` of the interval that ends at `step`."""
        if not self.speaks:
            return
        text = describe(metrics)
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        each = (time.monotonic() - self._started) / (step - self.first_step)
        left = duration(each * (self.total_steps - step))
        print(f"step {step}/{self.total_steps}  {text}  {left} to go", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self.speaks:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


SHOWN = (
    ("loss", "loss {:.3f}"),
    ("accuracy", "accuracy {:.1%}"),
    ("perplexity", "perplexity {:.1f}"),
    ("generator_loss", "generator loss {:.3f}"),
    ("generator_accuracy", "accuracy {:.1%}"),
    ("discriminator_loss", "discriminator loss {:.4f}"),
    ("discriminator_accuracy", "accuracy {:.1%}"),
    ("discriminator_precision", "precision {:.1%}"),
    ("discriminator_recall", "recall {:.1%}"),
    ("discriminator_auc", "ROC AUC {:.3f}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("skipped_steps", "{} steps left out"),
)


def describe(metrics: dict) -> str:
    """The main figures of `metrics` on one line; steps left out only if there are any."""
    shown = {name: value for name, value in metrics.items() if name != "skipped_steps" or value}
    return "  ".join(form.format(shown[name]) for name, form in SHOWN if name in shown)
