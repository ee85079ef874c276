"""What a run directory holds: settings, environment, metrics, samples, events.

Fields may be missing or null, and lines truncated: a report shows what is there.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from DeBERTa.config import read_json
from DeBERTa.errors import ConfigError, DataError
from DeBERTa.files import read_file

PAUSE_SECONDS = 3  # more time between two lines than training took: the run was stopped in between
Points = list[tuple[int, float]]


@dataclass
class RunRecord:
    """A run as its directory describes it.

    Attributes:
        settings: `config.json`, with the sections "train", "model" and "data".
        rows: the lines of `metrics.jsonl`, in order.
        samples: the lines of `samples.jsonl`, by step.
    """

    path: Path
    settings: dict
    environment: dict
    rows: list[dict]
    samples: dict[int, dict]

    def __post_init__(self) -> None:
        """Set what all readers need: name, settings of the training command, steps."""
        self.name = self.path.resolve().name
        self.train: dict = self.settings.get("train", {})
        self.step: int = max(row["step"] for row in self.rows)
        self.total_steps: int = max(self.train.get("num_training_steps") or 0, self.step, 1)

    def list_values(self, name: str, kind: str = "train") -> Points:
        """Return (step, value) of a metric, without missing values."""
        rows = (row for row in self.rows if row["kind"] == kind)
        return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]

    def get_last(self, name: str, kind: str = "train") -> float | None:
        """Return the last value of a metric, or None."""
        return next((value for _, value in reversed(self.list_values(name, kind))), None)

    def list_events(self) -> list[tuple[int, str]]:
        """Return (step, description) of resumes, spikes and skipped updates."""
        events = []
        for before, row in pairwise([{}, *self.rows]):
            if row["kind"] == "spike":
                values = (f"{name} {format_number(value)}" for name, value in row.items() if is_number(value))
                events.append((row["step"], f"spike: {', '.join(values)}"))
            if (pause := measure_pause(before, row)) > PAUSE_SECONDS:
                events.append((before["step"], f"stopped, and resumed after {format_duration(pause)}"))
        for (_, old), (step, new) in pairwise([(0, 0.0), *self.list_values("skipped_steps")]):
            if new > old:
                events.append((step, f"{new - old:.0f} updates skipped since the line before"))
        return sorted(events)


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises `DataError` if it has no metrics.
    """
    rows = [row for row in read_lines(run_dir / "metrics.jsonl") if isinstance(row.get("kind"), str)]
    if not rows:
        raise DataError(f"{run_dir}: there is no metrics.jsonl with metrics; give the directory of a run")
    steps = {row["step"] for row in rows}  # a killed run may have left samples of later steps
    samples = {line["step"]: line for line in read_lines(run_dir / "samples.jsonl") if line["step"] in steps}
    for row in (row for row in rows if row["kind"] == "valid" and row["step"] in samples):
        row["residual_drift"] = samples[row["step"]].get("residual_drift")
    for line in read_lines(run_dir / "probe.jsonl"):  # of python -m DeBERTa.probe
        for row in (row for row in rows if row["kind"] == "valid" and row["step"] == line["step"]):
            row |= {f"probe_{name}": line[name] for name in line if name.endswith("_accuracy")}
    described: dict[str, dict] = {"config": {}, "environment": {}}
    for name in described:
        with contextlib.suppress(ConfigError):
            described[name] = read_json(run_dir / f"{name}.json")
    return RunRecord(run_dir, described["config"], described["environment"], rows, samples)


def read_lines(path: Path) -> list[dict]:
    """Return the JSON objects with a step in a file of one per line.

    Other lines are omitted.
    """
    with contextlib.suppress(OSError):
        texts = read_file(path).decode(errors="replace").split("\n")  # predictions can hold other line ends
        return [line for text in texts if (line := parse_line(text))]
    return []


def parse_line(text: str) -> dict | None:
    """Return the values of a line, or None if it has no step.

    A crash truncated it then.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def measure_pause(before: dict, row: dict) -> float:
    """Return the seconds between two lines in which the run did not train."""
    try:
        clock = datetime.fromisoformat(row["time"]) - datetime.fromisoformat(before["time"])
        return clock.total_seconds() - (row["elapsed_seconds"] - before["elapsed_seconds"])
    except (KeyError, TypeError, ValueError):
        return 0.0


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether `value` is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_number(value: float) -> str:
    """Return a number in a few digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds without fractions."""
    return str(timedelta(seconds=round(seconds)))
