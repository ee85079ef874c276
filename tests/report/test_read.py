"""Run directories as crashes and other versions leave them."""

import json

import pytest

from DeBERTa.errors import DataError
from DeBERTa.report.read import read_run


def write(folder, *lines, name="metrics.jsonl"):
    (folder / name).write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )


def test_lines_that_are_no_metrics_are_skipped(tmp_path):
    write(
        tmp_path,
        {"step": 1, "kind": "train", "loss": 2.0},
        '{"step": 2, "ki',
        "[1]",
        {"step": 3},
        {"kind": "train"},
    )
    run = read_run(tmp_path)
    assert run.rows == [{"step": 1, "kind": "train", "loss": 2.0}]
    assert (run.settings, run.environment, run.samples) == ({}, {}, {})


@pytest.mark.parametrize("lines", [(), ("{",), ({"step": 1},)])
def test_no_metrics(lines, tmp_path):
    write(tmp_path, *lines)
    with pytest.raises(
        DataError, match=r"there is no metrics\.jsonl with metrics; give the directory of a run"
    ):
        read_run(tmp_path)


def test_the_last_samples_of_a_step_count(tmp_path):
    write(tmp_path, {"step": 2, "kind": "valid", "loss": 1.0})
    samples = [{"step": step, "residual_drift": drift} for step, drift in ((2, 0.1), (2, 0.2), (4, 0.3))]
    write(tmp_path, *samples, name="samples.jsonl")
    run = read_run(tmp_path)
    assert run.samples == {2: samples[1]}
    assert run.get_last("residual_drift", "valid") == 0.2


def test_events(tmp_path):
    def make_row(step, minute, elapsed, **values):
        time = f"2026-01-01T00:{minute:02}:00+00:00"
        return {"step": step, "kind": "train", "time": time, "elapsed_seconds": elapsed, **values}

    spike = make_row(20, 2, 120, loss=9.0, mean=2.0) | {"kind": "spike"}
    write(
        tmp_path,
        make_row(10, 1, 60),
        spike,
        make_row(20, 2, 120, skipped_steps=2),
        make_row(30, 9, 180, skipped_steps=2),
    )
    events = read_run(tmp_path).list_events()
    assert [step for step, _ in events] == [20, 20, 20]
    texts = sorted(text for _, text in events)
    assert texts[0] == "2 updates skipped since the line before"
    assert texts[1].startswith("spike: ")
    assert "loss 9, mean 2" in texts[1]
    assert texts[2] == "stopped, and resumed after 0:06:00"
