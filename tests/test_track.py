"""`experiments/track.py`: every line once, in the order of the steps, also of a run that continues."""

import json
import subprocess
import sys

import pytest

from DeBERTa.report.read import read_run
from experiments.track import is_complete, send_lines
from tests.conftest import ROOT, strip_times


def make_rows(steps):
    return [
        {
            "step": step,
            "kind": kind,
            "time": f"2026-01-01T00:00:{step:02}+00:00",
            "loss": 1.0 / step,
            "nothing": None,
        }
        for step in steps
        for kind in ("train", "valid")
    ]


def write(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(run_dir)


def track(run_dir, tracker, *flags):
    command = [sys.executable, "experiments/track.py", run_dir, "--tracker", tracker, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_lines_are_sent_once(tmp_path):
    received, sent = [], set()

    def send(metrics, step):
        received.append((step, metrics))

    send_lines(write(tmp_path, make_rows([1, 2])), send, sent)
    assert received == [(step, {"train/loss": 1.0 / step, "valid/loss": 1.0 / step}) for step in (1, 2)]
    send_lines(write(tmp_path, make_rows([1, 2, 4])), send, sent)
    assert received[2:] == [(4, {"train/loss": 0.25, "valid/loss": 0.25})]


def test_a_run_is_complete_after_its_last_evaluation(tmp_path):
    """Its line follows the last one of training, at base size minutes later."""
    settings = {"train": {"num_training_steps": 2}, "validation": {"valid_sha256": "0"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    rows = make_rows([1, 2])
    assert not is_complete(write(tmp_path, rows[:-1]))
    assert is_complete(write(tmp_path, rows))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"validation": {"valid_sha256": None}}))
    assert is_complete(write(tmp_path, rows[:-1]))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, make_rows([1, 2, 4]))
    result = track(tmp_path, "tensorboard", "--follow")
    assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "valid/loss"]
    assert [(event.step, event.value) for event in events.Scalars("valid/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (4, 0.25),
    ]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing(tracker, tmp_path):
    try:
        __import__(tracker)
    except ModuleNotFoundError:
        write(tmp_path, make_rows([1]))
        result = track(tmp_path, tracker)
        message = f"error: --tracker {tracker}: No module named '{tracker}'; pip install {tracker}\n"
        assert (result.returncode, strip_times(result.stderr)) == (1, message)
    else:
        pytest.skip(f"{tracker} is installed")


def test_no_run(tmp_path):
    assert strip_times(track(tmp_path, "wandb").stderr).startswith(
        f"error: {tmp_path}: there is no metrics.jsonl"
    )
