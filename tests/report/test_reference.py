"""Reference curves: the repository's fit their presets, and `--reference` finds what is near and far."""

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest

from DeBERTa.config import RTDConfig
from DeBERTa.errors import ConfigError
from DeBERTa.presets import PRESETS
from DeBERTa.report.__main__ import write_csv
from DeBERTa.report.health import NOTE, PROBLEM, USUAL
from DeBERTa.report.read import RunRecord
from DeBERTa.report.reference import CONFIGS, FOLDER, compare_with_reference

TAG = "deberta-v3-tiny"
STEPS = (400, 800, 1200)


def make_run(seed: int, factor: float = 1.0, **others) -> RunRecord:
    """Return a run whose curves depend a little on the seed."""
    rows = [{"kind": "train", "step": 1, "generator_loss": 9.0}]
    for step in STEPS:
        losses = {
            "generator_loss": factor * (6 - step / 1000 + seed / 100),
            "discriminator_auc": factor * 0.6,
            "discriminator_rarity_auc": 0.5 * factor**9,  # a baseline, not what was learned
        }
        rows.append({"kind": "valid", "step": step, **losses, "generator_accuracy": 0.1})
    return RunRecord(
        Path(f"seed-{seed}"), {"train": {"tag": TAG, **PRESETS[TAG].flags, **others}}, {}, rows, {}
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a directory with the curves of three seeds, as `--csv` writes them."""
    write_csv([make_run(seed) for seed in (1, 2, 3)], tmp_path / f"{TAG}.csv")
    return tmp_path


def test_a_run_is_near_or_far(folder):
    findings = compare_with_reference(make_run(4), folder)
    assert [finding.title for finding in findings] == ["generator loss", "discriminator auc"]
    assert {finding.level for finding in findings} == {USUAL}
    assert findings[0].text == "4.84 at step 1200; reference 4.82 ± 0.145 (3 seeds)"
    higher, lower = (compare_with_reference(make_run(2, factor), folder) for factor in (1.1, 0.9))
    assert [finding.level for finding in higher] == [PROBLEM, NOTE]  # a higher loss, a higher ROC AUC
    assert [finding.level for finding in lower] == [NOTE, PROBLEM]


def test_the_last_common_step_is_compared(folder):
    """Of a run that is not at its end, and of one that is evaluated at other steps."""
    run = make_run(2)
    run = dataclasses.replace(run, rows=run.rows[:3])
    assert "at step 800" in compare_with_reference(run, folder)[0].text
    other = dataclasses.replace(run, rows=[row | {"step": row["step"] + 1} for row in run.rows])
    assert compare_with_reference(other, folder) == []


def test_another_recipe_is_not_compared(folder):
    others = {
        "learning_rate": 0.1, "train_batch_size": 2, "rtd_lambda": 50.0, "weight_decay": 0.5,
        "max_seq_length": 64, "lr_schedule": "constant", "decoupled_training": False, "max_grad_norm": 0.1,
        "discriminator_learning_rate": 0.1, "num_training_steps": 6000, "task_name": "MLM",
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ConfigError, match=f"{name} differ from {TAG}; train the preset as it is"):
            compare_with_reference(make_run(1, **{name: value}), folder)
    free = {"log_interval": 7, "dump_interval": 100, "precision": "fp32", "attention": "eager"}
    assert compare_with_reference(make_run(1, **free, data_dir="/elsewhere", workers=0), folder)


def test_another_model_or_text_is_not_compared(folder):
    run = make_run(1)
    model = RTDConfig.from_json(CONFIGS / PRESETS[TAG].model_config).to_dict()
    run.settings["model"] = model
    assert compare_with_reference(run, folder)
    run.settings["model"] = model | {"embedding_sharing": "nes"}
    with pytest.raises(ConfigError, match="the model config differ from"):
        compare_with_reference(run, folder)
    del run.settings["model"]
    run.rows[-1]["text_sha256"] = "0" * 64
    with pytest.raises(ConfigError, match=r"another valid\.txt than the reference's"):
        compare_with_reference(run, folder)


def test_curves_are_recorded_again(folder):
    """With another validation text, they replace those that are there."""
    run = make_run(1)
    run.rows[-1]["text_sha256"] = "0" * 64
    (found,) = compare_with_reference(run, folder, folder / f"{TAG}.csv")
    assert found == (NOTE, "the reference", "is recorded again: its valid.txt is another")


def test_curves_are_recorded_for_the_first_time(tmp_path):
    """Other recipes are refused there, too; without `--csv` to that file there is nothing to compare with."""
    file = tmp_path / f"{TAG}.csv"
    (found,) = compare_with_reference(make_run(1), tmp_path, file)
    assert found == (NOTE, "the reference", "is recorded for the first time")
    with pytest.raises(ConfigError, match="rtd_lambda differ from"):
        compare_with_reference(make_run(1, rtd_lambda=50.0), tmp_path, file)
    for other in (None, tmp_path / "other.csv"):
        with pytest.raises(ConfigError, match=r"no reference curves .*\.csv; record them"):
            compare_with_reference(make_run(1), tmp_path, other)


def test_a_run_with_another_tag(folder):
    """The model config names the preset."""
    run = make_run(1, tag="seed-1", model_config=PRESETS[TAG].model_config)
    assert {finding.level for finding in compare_with_reference(run, folder)} == {USUAL}
    with pytest.raises(ConfigError, match=f"learning_rate differ from {TAG}; train the preset as it is"):
        compare_with_reference(
            make_run(1, tag="hot", model_config=PRESETS[TAG].model_config, learning_rate=1.0), folder
        )


@pytest.mark.parametrize("tag", ["", "deberta-v3-large", "../reference/x"])
def test_no_reference(folder, tag):
    with pytest.raises(
        ConfigError, match=r"no reference curves for .*; train one of bert-tiny, deberta-tiny"
    ):
        compare_with_reference(make_run(1, tag=tag), folder)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_curves_of_the_repository_are_of_the_presets_as_they_are(path):
    runs, flags = defaultdict(list), PRESETS[path.stem].flags
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            runs[row["run"]].append(row)
    assert len(runs) >= 3
    for rows in runs.values():
        assert int(rows[-1]["step"]) == flags["num_training_steps"]
        peak = max(float(row["learning_rate"] or 0) for row in rows)
        assert peak == pytest.approx(flags["learning_rate"], rel=0.1)
