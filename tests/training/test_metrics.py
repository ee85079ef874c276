"""`metrics.jsonl`, and what is computed for it."""

import json
import math
import os
import random
import resource
import shutil
import tracemalloc
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from DeBERTa.errors import StorageError
from DeBERTa.files import append_line
from DeBERTa.training.checkpoint import find_best, get_checkpoint_path, record_best
from DeBERTa.training.metrics import (
    MetricsLog,
    average_losses,
    format_metrics,
    measure_peak_memory,
    warn_of_undefined,
)
from tests.runs import run, tiny_flags

TEXTS = {"valid": None, "replay": None}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_carry_the_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, TEXTS, elapsed_seconds=100.0)
    log.write(1, "train", {"loss": math.nan, "norm": math.inf, "tokens_seen": 12})
    (line,) = read(path)
    assert (line["step"], line["kind"], line["tokens_seen"]) == (1, "train", 12)
    assert line["loss"] is None
    assert line["norm"] is None
    assert 100 <= line["elapsed_seconds"] < 160
    age = datetime.now(timezone.utc) - datetime.fromisoformat(line["time"])
    assert -1 <= age.total_seconds() < 60


def test_a_pipe_does_not_block_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file: "):
        MetricsLog(path, 4, TEXTS)


def test_a_resumed_run_reads_lines_one_by_one(tmp_path, caplog):
    """The file may be larger than the memory: of a long run, or with a gap that a crash left."""
    path = tmp_path / "metrics.jsonl"
    first, last = '{"step": 1, "kind": "valid", "loss": 2.0}\n', '{"step": 4, "kind": "train"}\n'
    path.write_text(first)
    os.truncate(path, 200_000_000)  # without data
    append_line(path, last.strip())
    tracemalloc.start()
    try:
        log = MetricsLog(path, 4, TEXTS)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert path.read_text() == first + last
    assert list(log.evaluations["valid"]) == [1]
    assert "damaged lines removed" in caplog.text


def test_lines_after_the_checkpoint_are_removed(tmp_path):
    """And a line that a crash truncated; evaluations before it are remembered."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, TEXTS)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0})
        log.write(step, "valid", {"loss": step / 2})
    path.write_text(path.read_text() + '{"step": 2, "kind": "tr')
    log = MetricsLog(path, 2, TEXTS)
    assert [(line["step"], line["kind"]) for line in read(path)] == [
        (1, "train"), (1, "valid"), (2, "train"), (2, "valid")
    ]  # fmt: skip
    assert {step: values["loss"] for step, values in log.evaluations["valid"].items()} == {1: 0.5, 2: 1.0}
    log.write(3, "train", {"loss": 2.0})
    assert read(path)[-1]["loss"] == 2.0


LINES = [
    "null", "[]", "3", "{}", '{"step": null}', '{"step": "1", "kind": "valid"}', "[" * 100_000, "\xff", "",
    '{"step": 1}', '{"step": 1, "kind": null}', '{"step": 1, "kind": "valid"}',
    '{"step": 1, "kind": "valid", "loss": "low"}', '{"step": 1, "kind": "valid", "loss": NaN}',
    '{"step": 1, "kind": "valid", "loss": null}', '{"step": 1, "kind": ["valid"], "loss": 0}',
]  # fmt: skip


def test_lines_of_any_shape(tmp_path, caplog):
    """Lines without a step are removed with a warning; the best checkpoint has a loss."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + '\n{"step": 2, "kind": "valid", "loss": 7}\n', encoding="latin-1")
    log = MetricsLog(path, 2, TEXTS)
    assert [line["step"] for line in read(path)] == [1, 1, 1, 1, 1, 1, 1, 2]
    assert "9 damaged lines removed" in caplog.text
    for step in (1, 2):
        get_checkpoint_path(tmp_path, step).mkdir(parents=True)
    assert find_best(tmp_path, log.evaluations["valid"]) == 2


def test_random_damage(tmp_path):
    """Undamaged lines remain, others can be read, and the best checkpoint is one that is there."""
    path, generator = tmp_path / "metrics.jsonl", random.Random(3)
    log = MetricsLog(path, 0, TEXTS | {"valid": "a"})
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0})
        log.write(step, "valid", {"loss": step / 2})
        get_checkpoint_path(tmp_path, step).mkdir(parents=True)
    valid = path.read_bytes()
    for _ in range(100):
        content = bytearray(valid)
        for _ in range(generator.choice((1, 5, 50))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        log = MetricsLog(path, 3, TEXTS | {"valid": "a"})
        undamaged = [line for line in bytes(content).split(b"\n") if line and line in valid.split(b"\n")]
        remaining = path.read_bytes().splitlines()
        assert [line for line in remaining if line in undamaged] == undamaged
        assert all(line["step"] <= 3 for line in read(path))
        evaluations = [json.loads(line) for line in undamaged]
        for line in (line for line in evaluations if line["kind"] == "valid"):
            assert log.evaluations["valid"][line["step"]]["loss"] == line["loss"]
        record_best(tmp_path, log.evaluations["valid"])
        best = tmp_path / "checkpoints" / "best.json"
        assert not best.exists() or json.loads(best.read_text())["step"] in log.evaluations["valid"]


@pytest.mark.parametrize("kind", ["valid", "replay"])
def test_evaluations_on_another_split_do_not_count(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    # A line of an earlier version: its text is that of the next one.
    path.write_text(f'{{"step": 1, "kind": "{kind}", "loss": 1.0}}\n')
    for step, split in ((2, "a"), (3, "b"), (4, None)):
        log = MetricsLog(path, step, TEXTS | {kind: split})
        if split:
            log.write(step, kind, {"loss": step + 0.5})
    assert [line.get("text_sha256") for line in read(path)] == [None, "a", "b"]
    for split, steps in (("a", [1, 2]), ("b", [3]), ("c", []), (None, [3])):
        log = MetricsLog(path, 4, TEXTS | {kind: split})
        assert list(log.evaluations[kind]) == steps
        assert log.has_other_texts == (split in ("a", "c"))  # than that of the last evaluation, "b"


def test_without_a_checkpoint_previous_lines_move(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7, "kind": "train"}\n')
    MetricsLog(path, 0, TEXTS)
    assert path.read_text() == ""
    assert read(tmp_path / "metrics.jsonl-1") == [{"step": 7, "kind": "train"}]


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, TEXTS, is_writer=False)
    log.write(1, "valid", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, TEXTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*metrics.jsonl: File too large; "):
            log.write(1, "train", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_named(tmp_path, prepared):
    """No error without a file's name follows the one that names it."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"log_interval": 1, "dump_interval": 100_000}
    assert run(flags | {"num_training_steps": 1, "tag": "data", "output_dir": tmp_path / "first"})[0] == 0
    status, output = run(flags | {"num_training_steps": 3000}, LARGEST_FILE="8000")
    assert status == 1, output
    message = f"error: cannot write {flags['output_dir']}/metrics.jsonl: File too large; raise `ulimit -f`, "
    assert output.splitlines()[-1].startswith(message)


def test_a_file_that_is_removed_or_replaced(tmp_path, caplog):
    """Later lines go to the file that is there; one that was removed or truncated is reported."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, TEXTS)
    log.write(1, "train", {})
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    log.write(2, "train", {})
    assert [line["step"] for line in read(path)] == [1, 2]
    assert not caplog.text
    path.unlink()
    log.sync()
    log.write(3, "train", {})
    log.write(4, "train", {})
    assert [line["step"] for line in read(path)] == [3, 4]
    message = f"{path} was removed or truncated during the run: lines from before step"
    assert caplog.text.count(f"{message} 3 are missing") == 1
    os.truncate(path, 0)
    log.write(5, "train", {})
    log.write(6, "train", {})
    assert [line["step"] for line in read(path)] == [5, 6]
    assert caplog.text.count(f"{message} 5 are missing") == 1
    assert caplog.text.count(message) == 2
    path.unlink()
    path.symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("text")
    with pytest.raises(StorageError, match="cannot write"):
        log.write(7, "train", {})
    assert (tmp_path / "precious").read_text() == "text"


def test_means_are_per_target():
    sums = {
        "generator_loss": torch.tensor(6.0),
        "generator_correct": torch.tensor(1),
        "generator_targets": torch.tensor(4),
        "grad_norm": torch.tensor(2.5),
        "loss": torch.tensor(0.0),
        "targets": torch.tensor(0),
    }
    assert average_losses(sums) == {
        "generator_loss": 1.5,
        "generator_accuracy": 0.25,
        "grad_norm": 2.5,
        "loss": None,
    }


def test_peak_memory_is_what_the_kernel_reports():
    status = Path("/proc/self/status").read_text().split("\n")
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    assert measure_peak_memory(torch.device("cpu")) == pytest.approx(peak * 1024 / 1e9, rel=0.02)


def test_undefined_metrics_are_no_figures(caplog, tmp_path):
    metrics = {"loss": None, "accuracy": None, "discriminator_precision": None, "discriminator_recall": 0.5}
    assert format_metrics(metrics) == "loss undefined  accuracy undefined  precision undefined  recall 50.0%"
    warn_of_undefined(metrics, "valid")
    (message,) = caplog.messages
    assert message.startswith("valid: loss is undefined: no token was masked; discriminator_precision is ")
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, TEXTS)
    log.write(1, "valid", metrics)
    (line,) = read(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["discriminator_recall"]) == (None, 0.5)


def test_skipped_steps_are_shown_if_there_are_any():
    assert format_metrics({"loss": 2.0, "skipped_steps": 0, "step": 4}) == "loss 2.000"
    assert format_metrics({"loss": 2.0, "skipped_steps": 3}) == "loss 2.000  3 steps skipped"
