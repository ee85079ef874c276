"""Faults that people make, seeded in real runs, are named; a run without them has none."""

import json
import random
import shutil
import string

import pytest

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.report.health import NOTE, PROBLEM, USUAL, examine
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
