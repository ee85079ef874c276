"""Domain adaptation: old text mixed in, both domains evaluated, a warning when the old one is forgotten."""

import hashlib
import json
import logging
import shutil
from fractions import Fraction

import pytest

from DeBERTa.data.dataset import BatchPlan, EvaluationBatches, Replay, TrainingBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.train import describe_data, describe_evaluation
from DeBERTa.training.trainer import describe_lines, warn_of_forgetting
from tests.test_train import flags, read_metrics  # noqa: F401
from tests.training.test_initial_weights import run_here  # noqa: F401


@pytest.fixture
def adapted(flags, tmp_path, prepared):  # noqa: F811
    """Return flags of a run on other text than it replays: the same pieces over and over."""
    (tmp_path / "new").mkdir()
    for split in ("train", "valid"):
        lines = (prepared / f"{split}.txt").read_text().splitlines()[:30]
        text = "".join(" ".join(line.split()[:20] * 3) + "\n" for line in lines)
        (tmp_path / "new" / f"{split}.txt").write_text(text)
    return flags | {"data_dir": tmp_path / "new", "replay": prepared, "replay_share": 0.25}


def select(lines: list[dict], kind: str) -> list[dict]:
    return [line for line in lines if line["kind"] == kind]


def test_both_domains_are_evaluated_and_a_resumed_run_equals_another(adapted, run_here):  # noqa: F811
    status, printed = run_here(adapted)
    assert status == 0, printed
    lines = read_metrics(adapted["output_dir"])
    for kind in ("valid", "replay"):
        assert [line["step"] for line in select(lines, kind)] == [0, 3, 6]
    # Both texts of --replay are in the fingerprint, by names that no other section has.
    settings = json.loads((adapted["output_dir"] / "config.json").read_text())
    hashes = [
        hashlib.sha256((adapted["replay"] / f"{s}.txt").read_bytes()).hexdigest() for s in ("train", "valid")
    ]
    data, validation = settings["data"], settings["validation"]
    assert [data["replay_sha256"], validation["replay_valid_sha256"]] == hashes
    assert data["replay_ids_sha256"] not in (None, data["train_ids_sha256"])
    assert {line["text_sha256"] for line in select(lines, "replay")} == {hashes[1]}
    # The epoch counts lines of train.txt alone.
    state = json.loads((adapted["output_dir"] / "checkpoints/step-00000006/state.json").read_text())
    rows = 6 * adapted["train_batch_size"]
    own, num_lines = rows - rows // 4, settings["data"]["train_lines"]
    assert (state["epoch"], state["lines_into_epoch"]) == divmod(own, num_lines)
    # Stopped after step 3, and resumed.
    second = adapted | {"output_dir": adapted["output_dir"].with_name("second")}
    assert run_here(second)[0] == 0
    shutil.rmtree(second["output_dir"] / "checkpoints" / "step-00000006")
    assert run_here(second)[0] == 0
    resumed = read_metrics(second["output_dir"])
    for kind in ("valid", "replay"):
        losses = [
            [(line["step"], line["generator_loss"], line["discriminator_loss"]) for line in select(run, kind)]
            for run in (lines, resumed)
        ]
        assert losses[0] == losses[1]
    status, printed = run_here(second | {"replay_share": 0.5})
    assert status == 1
    assert "replay_share (0.25 there, 0.5 here)" in printed


@pytest.mark.parametrize("has_valid", [True, False])
def test_a_resumed_run_evaluates_only_what_is_missing(adapted, run_here, has_valid):  # noqa: F811
    if not has_valid:
        (adapted["data_dir"] / "valid.txt").unlink()
    assert run_here(adapted)[0] == 0
    path = adapted["output_dir"] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert run_here(adapted)[0] == 0
    assert path.read_text().splitlines(keepends=True) == lines
    if has_valid:
        assert '"replay"' in lines[-1]
        path.write_text("".join(lines[:-1]))
        assert run_here(adapted)[0] == 0
        last = read_metrics(adapted["output_dir"])[-2:]
        assert [(line["kind"], line["step"]) for line in last] == [("valid", 6), ("replay", 6)]


def test_replay_needs_both_splits(adapted, run_here, tmp_path):  # noqa: F811
    status, printed = run_here(adapted | {"replay": tmp_path / "none"})
    assert status == 1
    assert f"--replay {tmp_path / 'none'}: no such directory" in printed


def test_nodes_compare_both_texts_of_replay(prepared, tokenizer):
    """The names of the training data and of the evaluated splits are distinct."""
    masker, plan = Masker(tokenizer, 1, False), BatchPlan(1, 8, 64)
    stores = {split: open_store(prepared / f"{split}.txt", tokenizer, 62) for split in ("train", "valid")}
    training = TrainingBatches(
        stores["train"], tokenizer, masker, plan, Replay(stores["train"], Fraction(1, 4))
    )
    held_out = EvaluationBatches(stores["valid"], tokenizer, masker, plan)
    data, evaluated = describe_data(training), describe_evaluation({"valid": held_out, "replay": held_out})
    assert {"replay_sha256", "replay_ids_sha256"} <= data.keys()
    assert {"replay_valid_sha256", "replay_valid_ids_sha256"} <= evaluated.keys()
    assert not data.keys() & evaluated.keys()


@pytest.mark.parametrize("share", ["0", "1/4", "3/4"])
def test_the_lines_of_a_batch_are_named_by_file(prepared, tokenizer, share):
    masker, plan = Masker(tokenizer, 1, False), BatchPlan(1, 1, 64)
    store = open_store(prepared / "train.txt", tokenizer, 62)
    batches = TrainingBatches(store, tokenizer, masker, plan, Replay(store, Fraction(share)))
    described = [describe_lines(batches, step) for step in range(8)]
    for step, text in enumerate(described):
        assert text.startswith(f"lines {batches.select_lines(step)[0] + 1} of train.txt")
    assert sum(text.endswith(" of train.txt of --replay") for text in described) == 8 * Fraction(share)


def test_warnings(caplog):
    first = {"generator_loss": 2.0, "discriminator_loss": 0.2, "generator_accuracy": 0.5}
    with caplog.at_level(logging.WARNING):
        warn_of_forgetting(5, first, {"generator_loss": 2.09, "discriminator_loss": 0.1})
        warn_of_forgetting(5, first, {"generator_loss": None, "discriminator_loss": 0.2})
        warn_of_forgetting(5, {}, {"generator_loss": 9.0})
        assert not caplog.records
        warn_of_forgetting(5, first, {"generator_loss": 2.5, "discriminator_loss": 0.2})
    (record,) = caplog.records
    assert (
        "step 5: generator_loss on the text of --replay is 2.5000, 25 % above the 2.0000"
        in record.getMessage()
    )
