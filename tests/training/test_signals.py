"""Signals to a run, and its data workers when they or the run die, as real signals to real processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify
from DeBERTa.training.signals import RunInterrupted, Signals
from tests.conftest import ROOT
from tests.processes import children, is_running
from tests.runs import CONTEXT, ForkedRun, final_files, run, tiny_flags


def kinds(run_dir: Path) -> list[tuple[int, str]]:
    return [
        (x["step"], x["kind"]) for x in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    ]


def all_ended(processes: list[int], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, processes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared) -> tuple[dict, dict[str, bytes]]:
    """Return the flags of a run of 60 steps, and its final files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = tiny_flags(folder, prepared) | {"num_training_steps": 60, "dump_interval": 40, "log_interval": 7}
    status, output = run(flags)
    assert status == 0, output
    return flags, final_files(flags["output_dir"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_the_run_resumes(tmp_path, undisturbed, number, status, workers):
    """Between two checkpoints and two lines of the log; sent to the process group, as a terminal does."""
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run", "workers": workers}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 7/")
    os.killpg(process.pid, number)
    found, output = process.finish()
    assert found == status, output
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith(f"stopped by {number.name}; ")
    (step,) = list_steps(flags["output_dir"])
    assert 7 <= step < 40
    verify(get_checkpoint_path(flags["output_dir"], step))
    found, output = run(flags)
    assert found == 0, output
    assert f"resuming from step {step}" in output
    assert final_files(flags["output_dir"]) == expected


def test_a_second_signal_ends_at_once(tmp_path, undisturbed):
    """In a long step: the process does not wait for its end."""
    flags = undisturbed[0] | {"output_dir": tmp_path / "run", "train_batch_size": 1200, "log_interval": 1}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 1/")
    os.kill(process.pid, signal.SIGTERM)
    process.wait_for("SIGTERM: finishing the step")
    os.kill(process.pid, signal.SIGINT)
    status, output = process.finish()
    assert status == 130, output
    assert "stopped by" not in output
    assert "Traceback" not in output
    assert list_steps(flags["output_dir"]) == []


def test_usr1_saves_and_training_continues(tmp_path, undisturbed):
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run", "workers": 1}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 7/")
    os.killpg(process.pid, signal.SIGUSR1)
    status, output = process.finish()
    assert status == 0, output
    steps = list_steps(flags["output_dir"])
    assert len(steps) == 3
    assert 7 <= steps[0] < 40
    assert steps[1:] == [40, 60]
    assert final_files(flags["output_dir"]) == expected
    for later in steps[1:]:  # resume from the extra checkpoint: its sums enter the next line of the log
        shutil.rmtree(get_checkpoint_path(flags["output_dir"], later))
    status, output = run(flags)
    assert status == 0
    assert f"resuming from step {steps[0]}" in output
    assert final_files(flags["output_dir"]) == expected


def test_a_signal_during_evaluation(tmp_path, prepared, undisturbed):
    """The evaluation ends at once, and the next start repeats it."""
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    shutil.copy(prepared / "train.txt", data / "valid.txt")  # long enough to be interrupted
    for path in data.glob("valid.txt.*"):
        path.unlink()
    flags = undisturbed[0] | {
        "data_dir": data,
        "eval_batch_size": 1,
        "num_training_steps": 4,
        "dump_interval": 2,
    }
    assert run(flags | {"output_dir": tmp_path / "undisturbed"})[0] == 0
    process = ForkedRun(flags | {"output_dir": tmp_path / "run"})
    checkpoint = get_checkpoint_path(tmp_path / "run", 2)
    while not checkpoint.exists():
        assert is_running(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    status, output = process.finish()
    assert status == 143, output
    assert "Traceback" not in output
    assert kinds(tmp_path / "run") == [(1, "train"), (2, "train")]
    verify(checkpoint)
    assert run(flags | {"output_dir": tmp_path / "run"})[0] == 0
    assert final_files(tmp_path / "run") == final_files(tmp_path / "undisturbed")


def _receive_twice() -> None:
    with Signals() as signals, signals.defer_stop():
        with contextlib.suppress(RunInterrupted), signals.allow_stop():
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)


def test_a_signal_that_comes_twice_during_an_evaluation_counts_once():
    """From the system and from the launcher: the checkpoint that is being written is completed."""
    process = CONTEXT.Process(target=_receive_twice)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_signal_while_saving(tmp_path, undisturbed):
    """The checkpoint that is being written is completed first."""
    flags = undisturbed[0] | {
        "output_dir": tmp_path / "run",
        "dump_interval": 1,
        "log_interval": 1,
        "keep_last": 100,
    }
    process = ForkedRun(flags)
    temporary = tmp_path / "run" / "checkpoints" / "step-00000005.tmp"
    while not temporary.exists():
        assert is_running(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    status, output = process.finish()
    assert status == 143, output
    steps = list_steps(tmp_path / "run")
    assert steps == list(range(1, steps[-1] + 1))
    assert 5 <= steps[-1] < 60
    for step in steps:
        verify(get_checkpoint_path(tmp_path / "run", step))
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_a_killed_data_worker(tmp_path, undisturbed):
    """One error, no orphans, and the same command resumes."""
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run", "workers": 2, "dump_interval": 10}
    process = ForkedRun(flags, live=True)
    process.wait_for("saved ")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    status, output = process.finish()
    assert status == 1, output
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("error: a data worker died")
    assert "--workers" in output
    assert all_ended(workers)
    status, output = run(flags | {"dump_interval": 40})
    assert status == 0
    assert "resuming from step" in output
    names = [name for name in expected if name.endswith("safetensors")]
    ours = final_files(flags["output_dir"])
    assert len(names) == 3
    assert {name: ours[name] for name in names} == {name: expected[name] for name in names}


def test_data_workers_end_with_a_killed_run(tmp_path, undisturbed):
    flags = undisturbed[0] | {"output_dir": tmp_path / "run", "workers": 2}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 7/")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish()[0] == -9
    assert all_ended(workers)


BROKEN = (
    "ConnectionResetError",
    "ConnectionRefusedError",
    "BrokenPipeError",
    "EOFError",
)  # depends on the moment
DEAD_WORKER = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # in all threads to come
import os, time, torch
from unittest import mock
from torch.utils.data import DataLoader
from DeBERTa.train import DataWorkerError, translate_worker_errors

batches = iter(DataLoader([torch.ones(9)] * 99, batch_size=None, num_workers=1))
next(batches)
time.sleep(1)  # the next ones are in the queue; their memory is sent when they are taken from it
(worker,) = batches._workers
os.kill(worker.pid, signal.SIGKILL)
os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
assert signal.SIGCHLD in signal.sigpending()
try:
    with translate_worker_errors(), mock.patch.object(type(worker), "is_alive", lambda _: True):
        next(batches)
except DataWorkerError as error:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    print("raised for", type(error.__cause__).__name__)
os._exit(0)
"""


def test_a_data_worker_killed_while_it_sends_a_batch():
    """A broken connection is seen before the process counts as dead; SIGCHLD arrives in its handler."""
    done = subprocess.run(
        [sys.executable, "-c", DEAD_WORKER], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout in {f"raised for {kind}\n" for kind in BROKEN}, done.stdout + done.stderr
    assert done.stderr == ""
