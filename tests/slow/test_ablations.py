"""The ablation command: killed during a run, it resumes, and has the results of a run that was not killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, tiny_model

PATIENCE = 900


def start(folder, name, steps=80):
    model = tiny_model() | {"max_position_embeddings": 128, "vocab_size": 8064}
    config = folder / "model.json"
    config.write_text(json.dumps({"generator": model, "discriminator": model}))
    flags = ["--arms", "es", "mlm-absolute", "--seeds", "1", "--steps", str(steps)]
    flags += ["--model_config", str(config), "--work", str(folder / name)]
    flags += ["--results", str(folder / f"{name}.jsonl")]
    environment = os.environ | {"DEBERTA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "experiments/ablations/run.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def wait_until(process, is_done):
    deadline = time.monotonic() + PATIENCE
    while not is_done():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint(tmp_path, number):
    """Also when it reaches the command alone, not all processes of the terminal."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, "stopped", steps=1600)
    work = tmp_path / "stopped"
    wait_until(process, lambda: any('"valid"' in p.read_text() for p in work.glob("*/metrics.jsonl")))
    time.sleep(1.0)  # the evaluation at step 200 is over, and the next far away
    process.send_signal(number)
    assert process.wait(PATIENCE) == 128 + number
    steps = sorted(int(path.name[5:]) for path in work.glob("es-*/checkpoints/step-*[0-9]"))
    assert 200 < steps[-1] < 400


def test_resume_after_a_kill(tmp_path):
    process = start(tmp_path, "killed")
    wait_until(process, lambda: list((tmp_path / "killed").glob("es-*/checkpoints/step-*[0-9]")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists()
    for name in ("killed", "uninterrupted"):
        assert start(tmp_path, name).wait(PATIENCE) == 0
    killed, uninterrupted = (read(tmp_path, name) for name in ("killed", "uninterrupted"))
    assert [result["arm"] for result in killed] == ["es", "mlm-absolute"]
    for ours, theirs in zip(killed, uninterrupted, strict=True):
        for name in ("steps", "final", "probe", "cosines", "curve"):
            assert ours[name] == theirs[name]
    assert killed[0]["steps"] == 80 < killed[1]["steps"]
    assert killed[0]["cosines"]["between"] == pytest.approx(1.0)  # ES: one table
    assert start(tmp_path, "killed").wait(PATIENCE) == 0
    assert read(tmp_path, "killed") == killed
