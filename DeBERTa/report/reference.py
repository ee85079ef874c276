"""Reference curves: what the tiny presets reach, with several seeds.

`experiments/reference/PRESET.csv` is written by `experiments/reference/record.sh PRESET`.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

from DeBERTa.config import find_experiments
from DeBERTa.errors import ConfigError
from DeBERTa.presets import PRESETS
from DeBERTa.report.health import NOTE, PROBLEM, USUAL, Finding
from DeBERTa.report.read import RunRecord, format_number

FOLDER = find_experiments() / "reference"
SIGMAS, SHARE = 4, 0.03  # tolerance: standard deviations over the seeds, at least this share of the mean
COMPARED = ("loss", "auc")  # endings of the metrics
FREE = ("dump_interval", "log_interval")  # flags of a preset that do not change what is learned


def compare_with_reference(run: RunRecord, folder: Path = FOLDER) -> list[Finding]:
    """Compare the last evaluation of both run and reference, metric by metric.

    Raises `ConfigError` if there is no reference for the run's settings.
    """
    tag = run.train.get("tag", "")
    path = folder / f"{tag}.csv"
    if tag not in PRESETS or not path.exists():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.csv"))) or "none"
        raise ConfigError(f"{run.path}: no reference curves for {tag!r}; train one of these presets: {there}")
    usual = {name: value for name, value in PRESETS[tag].flags.items() if name not in FREE}
    if others := [name for name, value in usual.items() if run.train.get(name) != value]:
        raise ConfigError(f"{run.path}: {', '.join(others)} differ from {tag}; train the preset as it is")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "valid"]
    findings = []
    for name in (name for name in rows[0] if name.endswith(COMPARED)):
        values = dict(run.list_values(name, "valid"))
        step = max((int(row["step"]) for row in rows if row[name] and int(row["step"]) in values), default=0)
        seeds = [float(row[name]) for row in rows if int(row["step"]) == step and row[name]]
        if len(seeds) > 1:
            tolerance = max(SIGMAS * stdev(seeds), SHARE * mean(seeds))
            value, expected, most = map(format_number, (values[step], mean(seeds), tolerance))
            text = f"{value} at step {step}; reference {expected} ± {most} ({len(seeds)} seeds)"
            gain = (values[step] - mean(seeds)) * (1 if name.endswith("auc") else -1)
            level = USUAL if abs(gain) <= tolerance else NOTE if gain > 0 else PROBLEM
            findings.append(Finding(level, name.replace("_", " "), text))
    return findings
