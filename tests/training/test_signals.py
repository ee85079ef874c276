"""Signals to a run, and its data workers when they or the run die, as real signals to real processes."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify
from DeBERTa.training.signals import RunInterrupted, Signals
from tests.conftest import ROOT
from tests.processes import find_started, is_running, list_children
from tests.runs import CONTEXT, PATIENCE, ForkedRun, build_arguments, read_final_files, run, tiny_flags


def read_kinds(run_dir: Path) -> list[tuple[int, str]]:
    return [
        (x["step"], x["kind"]) for x in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    ]


def wait_for_ends(processes: list[int], seconds: float = 60) -> bool:
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
    return flags, read_final_files(flags["output_dir"])


@pytest.mark.parametrize(
    ("number", "workers", "status"),
    [
        (signal.SIGTERM, 0, 143),
        (signal.SIGTERM, 2, 143),
        (signal.SIGINT, 0, 130),
        (signal.SIGINT, 2, 130),
        (signal.SIGHUP, 2, 129),
    ],
)
def test_a_signal_saves_and_the_run_resumes(tmp_path, undisturbed, number, workers, status):
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
    assert read_final_files(flags["output_dir"]) == expected


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


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)])
def test_a_hang_up_is_no_second_signal(tmp_path, undisturbed, order):
    """A closed terminal and its shell both send SIGHUP, and systemd sends it after SIGTERM, or before."""
    flags = undisturbed[0] | {"output_dir": tmp_path / "run", "train_batch_size": 1200, "log_interval": 1}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 1/")
    first, second = order
    os.kill(process.pid, first)
    process.wait_for(f"{first.name}: finishing the step")
    os.kill(process.pid, second)
    status, output = process.finish()
    assert status == 128 + first, output
    assert len(list_steps(flags["output_dir"])) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_ends_does_not_end_the_run(tmp_path, undisturbed, workers):
    """As in `2>&1 | head -2`."""
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run", "workers": workers}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 7/")
    process.stop_reading()
    assert process.finish()[0] == 0
    assert read_final_files(flags["output_dir"]) == expected


@pytest.mark.parametrize(
    ("redirection", "more"),
    [("2>/dev/full", {}), ("2>&- >&- <&-", {}), ("2>&1 | head -2", {"nproc_per_node": 2})],
)
def test_a_run_does_not_depend_on_its_console(tmp_path, prepared, redirection, more):
    flags = tiny_flags(tmp_path, prepared) | {"log_interval": 1} | more
    line = shlex.join([sys.executable, "-m", "DeBERTa.train", *build_arguments(flags)])
    script = f"{line} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert list_steps(flags["output_dir"]) == [2, 4, 6]
    assert (flags["output_dir"] / "generator" / "model.safetensors").exists()
    assert len(read_kinds(flags["output_dir"])) == 9


@pytest.mark.parametrize(
    ("more", "is_ignored", "status"),
    [({}, False, 129), ({"nproc_per_node": 2}, False, 129), ({}, True, 0)],
)
def test_a_terminal_that_is_closed(tmp_path, prepared, more, is_ignored, status):
    """The kernel sends SIGHUP to all processes of the terminal. Under `nohup` they ignore it."""
    steps = 20 if is_ignored else 1_000_000
    flags = tiny_flags(tmp_path, prepared) | {"dump_interval": 1_000_000, "num_training_steps": steps} | more
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "DeBERTa.train", *build_arguments(flags)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown, metrics = b"", flags["output_dir"] / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():  # written after the first step
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == status, shown.decode()
    assert len(list_steps(flags["output_dir"])) == 1
    assert not find_started(str(flags["output_dir"]))


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
    assert read_final_files(flags["output_dir"]) == expected
    for later in steps[1:]:  # resume from the extra checkpoint: its sums enter the next line of the log
        shutil.rmtree(get_checkpoint_path(flags["output_dir"], later))
    status, output = run(flags)
    assert status == 0
    assert f"resuming from step {steps[0]}" in output
    assert read_final_files(flags["output_dir"]) == expected


@pytest.mark.parametrize("name", [None, "deberta-train"])
def test_usr1_while_packages_are_imported(tmp_path, name):
    """It does nothing, whether the command is started as a module or as the installed script."""
    arguments = ["-m", "DeBERTa.train"] if name is None else [str(tmp_path / name)]
    (tmp_path / "deberta-train").write_text("from DeBERTa.train import run_command\nrun_command()\n")
    started = subprocess.Popen([sys.executable, *arguments, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while "/numpy/" not in Path(f"/proc/{started.pid}/maps").read_text():
        assert started.poll() is None  # else it has ended, and the signal would reach no process
        time.sleep(0.001)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(PATIENCE) == 0


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
    assert read_kinds(tmp_path / "run") == [(1, "train"), (2, "train")]
    verify(checkpoint)
    assert run(flags | {"output_dir": tmp_path / "run"})[0] == 0
    assert read_final_files(tmp_path / "run") == read_final_files(tmp_path / "undisturbed")


def _receive_twice() -> None:
    with Signals() as signals, signals.defer_stop():
        with contextlib.suppress(RunInterrupted), signals.allow_stop():
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)


def _work_without_python() -> None:
    """Receive SIGTERM twice within 50 ms, of which the second comes during two seconds of one call."""

    def send() -> None:
        for pause in (0.2, 0.05):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)

    def work(rounds: int) -> float:
        started = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        return time.monotonic() - started

    rounds = int(2 * 100_000 / work(100_000))
    with Signals() as signals, signals.defer_stop():
        threading.Thread(target=send).start()
        while not signals.stop_signal:
            time.sleep(0.001)
        os._exit(0 if work(rounds) > 1.1 else 2)


def test_a_signal_that_comes_twice_during_a_long_operation_counts_once():
    """The handler of the second one runs after the operation, in Python."""
    process = CONTEXT.Process(target=_work_without_python)
    process.start()
    process.join()
    assert process.exitcode == 0


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
    workers = list_children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    status, output = process.finish()
    assert status == 1, output
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("error: a data worker died")
    assert "--workers" in output
    assert wait_for_ends(workers)
    status, output = run(flags | {"dump_interval": 40})
    assert status == 0
    assert "resuming from step" in output
    names = [name for name in expected if name.endswith("safetensors")]
    ours = read_final_files(flags["output_dir"])
    assert len(names) == 3
    assert {name: ours[name] for name in names} == {name: expected[name] for name in names}


def test_data_workers_end_with_a_killed_run(tmp_path, undisturbed):
    flags = undisturbed[0] | {"output_dir": tmp_path / "run", "workers": 2}
    process = ForkedRun(flags, live=True)
    process.wait_for("step 7/")
    workers = list_children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish()[0] == -9
    assert wait_for_ends(workers)


@pytest.mark.parametrize("more", [{}, {"nproc_per_node": 2}], ids=["one rank", "two ranks"])
def test_a_signal_while_a_batch_does_not_come(tmp_path, undisturbed, more):
    """The data worker is stopped, as one that waits for a lost disk.

    One rank saves first. Of two, the other waits in a step, so that nothing can be saved.
    """
    run_dir = tmp_path / "run"
    flags = undisturbed[0] | {"output_dir": run_dir, "workers": 1, "num_training_steps": 1_000_000} | more
    process = ForkedRun(flags | {"dump_interval": 10, "log_interval": 1})
    while not list_steps(run_dir):
        assert is_running(process.pid)
    ranks = list_children(process.pid) if more else [process.pid]
    worker = min(list_children(max(ranks)))  # an evaluation has one of its own
    started = [*ranks, worker]
    os.kill(worker, signal.SIGSTOP)
    before = -1
    while (after := len((run_dir / "metrics.jsonl").read_text())) != before:
        before = after
        time.sleep(1)  # many steps take less: the prefetched batches are used up
    saved = list_steps(run_dir)
    os.kill(process.pid, signal.SIGTERM)
    status, output = process.finish()
    assert status == 143, output
    assert wait_for_ends(started)
    assert not find_started(str(run_dir))
    if more:
        assert list_steps(run_dir) == saved
        return
    assert output.strip().splitlines()[-1].startswith("stopped by SIGTERM; the same command resumes")
    steps = [line["step"] for line in map(json.loads, (run_dir / "metrics.jsonl").open())]
    assert max(list_steps(run_dir)) == max(steps)  # no step is lost
