"""Faults that people make, seeded in real runs, are named; a run without them has none."""

import json
import math
import random
import shutil
import string

import pytest

from DeBERTa.data.token_store import get_part_name, open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.presets import PRESETS
from DeBERTa.report.health import NOTE, PROBLEM, USUAL, examine, measure_text
from DeBERTa.report.read import RunRecord, read_run
from tests.conftest import GOLDEN
from tests.data.texts import prepare
from tests.report.runs import STEPS, train, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def healthy(text, tmp_path_factory):
    return train(tmp_path_factory.mktemp("healthy") / "run", text)


def list_titles(run_dir, *levels):
    return [finding.title for finding in examine(read_run(run_dir)) if finding.level in levels]


def test_a_healthy_run(healthy):
    assert list_titles(healthy, PROBLEM, NOTE) == []
    learned = {"The generator learns", "The discriminator learns", "Vocabulary", "Masking", "Replaced tokens"}
    assert learned | {"Drift of the GDES residual", "Stability", "Cost"} == set(list_titles(healthy, USUAL))


def test_lambda_0(text, tmp_path):
    run = train(tmp_path / "run", text, rtd_lambda=0, num_training_steps=20, dump_interval=20)
    assert {"The discriminator is not trained", "Drift of the GDES residual"} <= {*list_titles(run, PROBLEM)}


def test_ten_times_the_learning_rate(text, tmp_path):
    run = train(tmp_path / "run", text, learning_rate=1e-2)
    assert list_titles(run, PROBLEM) == ["The discriminator is at chance"]
    settings = json.loads((run / "config.json").read_text())
    settings["train"] |= {"tag": "deberta-v3-tiny", "learning_rate": 2e-2}
    (run / "config.json").write_text(json.dumps(settings))
    assert "Learning rate" in list_titles(run, PROBLEM)


@pytest.mark.parametrize(
    ("fault", "steps", "title"),
    [
        ("MASKED_SHARE = 0.0", 10, "No token is masked"),
        ("Masker._draw_replacements = lambda self, ids, *_: ids", 60, "Masked tokens are visible"),
    ],
)
def test_no_masking(fault, steps, title, text, tmp_path):
    before = f"import DeBERTa.data.masking\nDeBERTa.data.masking.{fault}"
    run = train(tmp_path / "run", text, before, num_training_steps=steps, dump_interval=steps)
    assert title in list_titles(run, PROBLEM)


def test_a_vocabulary_for_other_text(tmp_path):
    """Unknown words are cut into letters; `prepare` itself refuses text with many [UNK]."""
    text, vocabulary = tmp_path / "text", GOLDEN / "prepare" / "spm.model"
    text.mkdir()
    choose = random.Random(0).choice
    words = ["".join(choose(string.ascii_lowercase) for _ in range(9)) for _ in range(50)]
    for split in ("train", "valid"):
        raw = text / f"{split}.raw"
        raw.write_text("".join(" ".join(choose(words) for _ in range(50)) + "\n" for _ in range(60)))
        prepare(raw, text / f"{split}.txt", vocabulary, 64)
    shutil.copy(vocabulary, text / "spm.model")
    run = train(tmp_path / "run", text, num_training_steps=4, dump_interval=4)
    assert list_titles(run, PROBLEM)[0] == "The vocabulary does not fit the text"


def test_a_text_in_parts(text, tmp_path, monkeypatch):
    """It is measured as one file; without its ids, and without a part, it is not."""
    vocabulary, parts = text / "spm.model", tmp_path / "train.txt"
    parts.mkdir()
    lines = (text / "train.txt").read_text().splitlines(keepends=True)
    for number in range(2):
        part = "".join(lines[number * len(lines) // 2 : (number + 1) * len(lines) // 2])
        (parts / get_part_name(number, 2)).write_text(part)

    def measure(directory):
        measure_text.cache_clear()
        return measure_text(str(directory), str(vocabulary))

    assert measure(tmp_path) is None
    store, _ = (open_store(path, Tokenizer(vocabulary), 1000) for path in (parts, text / "train.txt"))
    full = measure(text)
    assert measure(tmp_path) == pytest.approx(full)
    monkeypatch.setattr("DeBERTa.report.health.TEXT_TOKENS", store.files[0].meta.num_tokens)
    assert measure(tmp_path) == pytest.approx(measure(text))
    assert measure(tmp_path) != pytest.approx(full)
    (parts / get_part_name(1, 2)).unlink()
    assert measure(tmp_path) is None
    assert measure(tmp_path / ("long" * 100)) is None  # whatever the system says of it


def test_a_vocabulary_for_other_weights(text, healthy, tmp_path):
    """The text has the same structure in other ids, which nothing else would show."""
    weights = {
        f"init_{name}": healthy / name / "model.safetensors" for name in ("generator", "discriminator")
    }
    flags = {"num_training_steps": 4, "dump_interval": 4, **weights}
    assert "Vocabulary" in list_titles(train(tmp_path / "same", text, **flags), USUAL)
    other = shutil.copytree(text, tmp_path / "text", ignore=shutil.ignore_patterns("*.ids"))
    known = sorted({word for path in other.glob("*.txt") for word in path.read_text().split()})
    pieces = [piece for piece in Tokenizer(other / "spm.model").pieces[4:-1] if piece not in known]
    table = dict(zip(known, pieces, strict=False))
    for path in other.glob("*.txt"):
        lines = [" ".join(table[word] for word in line.split()) + "\n" for line in path.open()]
        path.write_text("".join(lines))
    run = train(tmp_path / "other", other, **flags)
    assert "The vocabulary does not fit the weights" in list_titles(run, PROBLEM)


def make_run(tmp_path, rows, **settings):
    return RunRecord(tmp_path, {"train": settings}, {}, rows, {})


def test_chance_is_usual_at_first(healthy, tmp_path):
    early = shutil.copytree(healthy, tmp_path / "run")
    rows = [json.loads(line) for line in (healthy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "valid":
            row |= {"discriminator_auc": 0.52, "discriminator_recall": 0.0}
    for last, level in ((STEPS // 3, NOTE), (STEPS, PROBLEM)):
        lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= last]
        (early / "metrics.jsonl").write_text("".join(lines))
        found = [f for f in examine(read_run(early)) if f.title.startswith("The discriminator")]
        assert [finding.level for finding in found] == [level]
        assert f"usual until about step {STEPS // 2}" in found[0].text


def test_diverging(tmp_path):
    rows = [{"step": n, "kind": "train", "loss": 3.0 + 0.1 * max(n - 30, 0)} for n in range(60)]
    levels = {finding.title: finding.level for finding in examine(make_run(tmp_path, rows))}
    assert levels["Training diverges"] == PROBLEM
    rows = [{"step": n, "kind": "train", "loss": None} for n in range(60)]
    assert "60 losses that are null. They were not finite, or" in examine(make_run(tmp_path, rows))[0].text
    rows[:20] = [{"step": n, "kind": "train", "loss": 3.0} for n in range(20)]
    rows[20:] = [{"step": n, "kind": "train"} for n in range(20, 35)]  # as Interval writes it
    assert "15 losses that are null" in examine(make_run(tmp_path, rows))[0].text


@pytest.mark.parametrize("number", range(3, 9))
def test_diverging_at_the_end(tmp_path, number):
    """The last lines count, whatever the number of lines."""
    losses = [6.0 - 0.1 * n for n in range(20)] + [12.0] * number
    rows = [{"step": n, "kind": "train", "loss": loss} for n, loss in enumerate(losses)]
    assert "Training diverges" in [finding.title for finding in examine(make_run(tmp_path, rows))]


def test_before_the_first_step(tmp_path):
    """With --replay both texts are evaluated there: nothing is masked or moved yet."""
    figures = {"generator_loss": 9.0, "generator_accuracy": 0.0, "residual_drift": 0.0}
    rows = [{"step": 0, "kind": kind, **figures} for kind in ("valid", "replay")]
    assert PROBLEM not in [finding.level for finding in examine(make_run(tmp_path, rows))]
    rows.append({"step": 60, "kind": "train", "loss": 9.0})  # and no evaluation since
    assert PROBLEM not in [finding.level for finding in examine(make_run(tmp_path, rows))]


@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_new_head_starts_at_chance(tmp_path, is_fresh):
    rows = [{"step": 1, "kind": "train", "loss": 10.5}]
    run = make_run(tmp_path, rows, init_model="x.bin", fresh_head=is_fresh)
    run.settings["model"] = {"vocab_size": 8064}
    titles = [finding.title for finding in examine(run) if finding.level == PROBLEM]
    assert titles == ([] if is_fresh else ["The vocabulary does not fit the weights"])


def test_rows_with_nothing(tmp_path):
    for row in ({}, {"loss": None}, {"discriminator_auc": None}, {string.ascii_letters: 1}):
        rows = [{"step": 1, "kind": kind, **row} for kind in ("train", "valid", "spike", "old")]
        assert [finding.title for finding in examine(make_run(tmp_path, rows))] == ["Stability"]


DETECTED = {
    "discriminator_loss": 0.3,
    "discriminator_auc": 0.7,
    "discriminator_recall": 0.1,
    "discriminator_replaced_entropy": 0.38,
}
TINY_RATE = PRESETS["deberta-v3-tiny"].flags["learning_rate"]


def examine_row(tmp_path, row, kind, settings=None):
    """Return titles and levels for a run of one step out of 100,000, where RTD begins to learn at 2,000."""
    rows = [{"step": 1, "kind": "train", "generator_loss": 2.0}, {"step": 3000, "kind": kind, **row}]
    run = make_run(tmp_path, rows, num_training_steps=100_000, **(settings or {}))
    return {finding.title: finding.level for finding in examine(run)}


@pytest.mark.parametrize(
    ("row", "kind", "title", "level"),
    [
        ({"generator_accuracy": 0.96}, "train", "Masking", USUAL),
        ({"generator_accuracy": 0.98}, "train", "Masked tokens are visible", PROBLEM),
        ({"discriminator_replaced": 0.004}, "valid", "Replaced tokens", PROBLEM),
        ({"discriminator_replaced": 0.006}, "valid", "Replaced tokens", USUAL),
        ({"discriminator_replaced": 0.15}, "valid", "Replaced tokens", USUAL),
        ({"discriminator_replaced": 0.17}, "valid", "Replaced tokens", PROBLEM),
        ({"residual_drift": 0.9}, "valid", "Drift of the GDES residual", USUAL),
        ({"residual_drift": 1.1}, "valid", "Drift of the GDES residual", NOTE),
        ({"residual_drift": 0.0}, "valid", "Drift of the GDES residual", PROBLEM),
        (DETECTED, "valid", "The discriminator learns", USUAL),
        (DETECTED | {"discriminator_auc": 0.56}, "valid", "The discriminator learns", USUAL),
        (DETECTED | {"discriminator_auc": 0.54}, "valid", "The discriminator is at chance", PROBLEM),
        (DETECTED | {"discriminator_loss": 0.39}, "valid", "The discriminator is at chance", PROBLEM),
        (DETECTED | {"discriminator_recall": 0.012}, "valid", "The discriminator learns", USUAL),
        (
            DETECTED | {"discriminator_recall": 0.008},
            "valid",
            "The discriminator predicts “original” alone",
            PROBLEM,
        ),
    ],
)
def test_bounds_of_metrics(tmp_path, row, kind, title, level):
    assert examine_row(tmp_path, row, kind)[title] == level


@pytest.mark.parametrize("tag", ["deberta-v3-tiny", "hot"])
@pytest.mark.parametrize(("factor", "level"), [(0.18, PROBLEM), (0.22, USUAL), (4.8, USUAL), (5.2, PROBLEM)])
def test_bounds_of_the_learning_rate(tmp_path, factor, level, tag):
    settings = {"tag": tag, "model_config": "rtd_tiny.json", "learning_rate": factor * TINY_RATE}
    assert examine_row(tmp_path, {}, "train", settings)["Learning rate"] == level


@pytest.mark.parametrize(
    ("rows", "level", "text"),
    [
        ([], USUAL, "0 spikes, 0 skipped updates, 0 losses that are null."),
        ([{"step": 2, "kind": "spike", "loss": 9.0}], NOTE, "1 spikes, 0 skipped updates, "),
        (
            [{"step": 2, "kind": "train", "loss": 3.0, "skipped_steps": 4}],
            NOTE,
            "0 spikes, 4 skipped updates, ",
        ),
    ],
)
def test_stability(tmp_path, rows, level, text):
    rows = [{"step": 1, "kind": "train", "loss": 3.0}, *rows]
    (found,) = (finding for finding in examine(make_run(tmp_path, rows)) if finding.title == "Stability")
    assert found.level == level
    assert found.text.startswith(text)


def test_cost(tmp_path):
    """250 of 1,000 steps took an hour on four processes: three more are left."""
    rows = [{"step": 250, "kind": "train", "elapsed_seconds": 3600.0, "tokens_seen": 12_000_000}]
    run = make_run(tmp_path, rows, num_training_steps=1000)
    run.environment["processes"] = 4
    (found,) = (finding for finding in examine(run) if finding.title == "Cost")
    assert found.text == "1:00:00 so far (4 process-hours), 3:00:00 to go; 12,000,000 tokens seen."


@pytest.mark.parametrize(("last", "is_problem"), [(3.25, False), (3.35, True)])
def test_bound_of_divergence(tmp_path, last, is_problem):
    """More than a tenth above the lowest median of five lines."""
    losses = [3.0] * 5 + [last] * 5
    rows = [{"step": n, "kind": "train", "loss": loss} for n, loss in enumerate(losses)]
    titles = [finding.title for finding in examine(make_run(tmp_path, rows))]
    assert ("Training diverges" in titles) == is_problem


@pytest.mark.parametrize(("share", "is_problem"), [(0.88, False), (0.92, True)])
def test_bound_of_the_first_loss(tmp_path, share, is_problem):
    rows = [{"step": 1, "kind": "train", "loss": share * math.log(8064)}]
    run = make_run(tmp_path, rows, init_model="x.bin")
    run.settings["model"] = {"vocab_size": 8064}
    titles = [finding.title for finding in examine(run)]
    assert ("The vocabulary does not fit the weights" in titles) == is_problem


@pytest.mark.parametrize(
    ("measured", "title", "level"),
    [
        ((7.0, 0.009, 0.59), "Vocabulary", USUAL),
        ((7.0, 0.011, 0.59), "The vocabulary does not fit the text", PROBLEM),
        ((7.0, 0.009, 0.61), "The vocabulary does not fit the text", PROBLEM),
        ((2.10, 0.0, 0.0), "The generator learns", USUAL),  # its loss is 2.0
        ((2.04, 0.0, 0.0), "The generator is at chance", PROBLEM),
    ],
)
def test_bounds_of_the_text(tmp_path, monkeypatch, measured, title, level):
    monkeypatch.setattr("DeBERTa.report.health.measure_text", lambda *_: measured)
    assert examine_row(tmp_path, {}, "train")[title] == level


@pytest.mark.parametrize(
    ("total", "warmup", "onset"),
    [(100_000, 500, 2000), (100_000, 1500, 3000), (100_000, 0.05, 10_000), (3000, 100, 1500)],
)
@pytest.mark.parametrize("change", [{"discriminator_auc": 0.5}, {"discriminator_recall": 0.0}])
def test_until_when_chance_is_usual(tmp_path, total, warmup, onset, change):
    """Also that it finds no token. Twice the warm-up, at least 2,000 steps, at most half of the run."""
    levels = []
    for step in (onset, onset + 1):
        rows = [{"step": 1, "kind": "train", "generator_loss": 2.0}]
        rows.append({"step": step, "kind": "valid", **DETECTED})
        rows[1] |= change
        found = examine(make_run(tmp_path, rows, num_training_steps=total, warmup=warmup))
        found = [finding for finding in found if finding.title.startswith("The discriminator")]
        assert f"usual until about step {onset:,}." in found[0].text
        levels += [finding.level for finding in found]
    assert levels == [NOTE, PROBLEM]
