"""Reference curves: what the tiny presets reach, with several seeds.

`experiments/reference/PRESET.csv` is written by `experiments/reference/record.sh PRESET`.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

from DeBERTa.config import FREE_TO_CHANGE, ModelConfig, RTDConfig, TrainConfig, find_experiments
from DeBERTa.errors import ConfigError
from DeBERTa.presets import PRESETS, guess_preset
from DeBERTa.report.health import NOTE, PROBLEM, USUAL, Finding
from DeBERTa.report.read import RunRecord, format_number

FOLDER, CONFIGS = find_experiments() / "reference", find_experiments() / "language_model"
SIGMAS, SHARE = 4, 0.03  # tolerance: standard deviations over the seeds, at least this share of the mean
# Metrics of the model; `discriminator_rarity_auc` is of the tokens alone.
COMPARED = ("loss", "generator_loss", "discriminator_loss", "discriminator_auc")
# Flags that do not change what is learned, or not more than another seed does.
FREE = (
    "tag", "seed", "dump_interval", "log_interval", "max_skipped_steps", "accumulative_update",
    "precision", "fp16", "tf32", "kernels", "attention", "compile", "deterministic", "sharding",
)  # fmt: skip
TINY = [name for name, preset in PRESETS.items() if preset.corpus == "sample"]


def find_reference(run: RunRecord, folder: Path = FOLDER) -> Path:
    """Return the file of the reference curves of a run's preset.

    It need not exist yet. Raises `ConfigError` if the run is not of a tiny preset as it is.
    """
    name = guess_preset(run.train)
    if name not in TINY:
        what = name or f"{run.train.get('tag')!r}"
        raise ConfigError(f"{run.path}: no reference curves for {what}; train one of {', '.join(TINY)}")
    preset = PRESETS[name]
    usual = TrainConfig(preset.task_name, max_seq_length=preset.max_seq_length, **preset.flags).to_dict()
    names = [name for name in usual if name in preset.flags or name not in FREE_TO_CHANGE]
    differing = [
        name for name in names if name not in FREE and run.train.get(name, usual[name]) != usual[name]
    ]
    config = RTDConfig if preset.task_name == "RTD" else ModelConfig
    model = config.from_json(CONFIGS / preset.model_config).to_dict()
    if run.settings.get("model", model) != model:
        differing.append("the model config")
    if differing:
        raise ConfigError(f"{run.path}: {', '.join(differing)} differ from {name}; train the preset as it is")
    return folder / f"{name}.csv"


def compare_with_reference(
    run: RunRecord, folder: Path = FOLDER, recorded: Path | None = None
) -> list[Finding]:
    """Compare the last evaluation of both run and reference, metric by metric.

    `recorded`: a file that is written next; if it is to be the reference, there need not be one, and it may
    be of another validation text. Raises `ConfigError` if there is no reference for the run's settings and
    validation text.
    """
    path = find_reference(run, folder)
    is_recorded = recorded is not None and recorded.resolve() == path.resolve()
    if not path.exists():
        if is_recorded:
            return [Finding(NOTE, "the reference", "is recorded for the first time")]
        raise ConfigError(f"{run.path}: no reference curves {path}; record them (docs/report.md)")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "valid"]
    texts = {row["text_sha256"] for row in run.rows if row["kind"] == "valid" and "text_sha256" in row}
    if not texts <= {row.get("text_sha256") for row in rows}:
        if is_recorded:
            return [Finding(NOTE, "the reference", "is recorded again: its valid.txt is another")]
        raise ConfigError(f"{run.path}: another valid.txt than the reference's; train the preset as it is")
    findings = []
    for name in (name for name in rows[0] if name in COMPARED):
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
