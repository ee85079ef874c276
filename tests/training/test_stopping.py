"""Signals to runs of several processes: to the command, to some of its processes, to all.

Afterwards the same command, or the run by itself, resumes and ends with the same bits.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify
from DeBERTa.training.nodes import GRACE_SECONDS
from DeBERTa.training.signals import DUPLICATE_SECONDS
from tests.commands import (
    ENDLESS,
    PATIENCE,
    Command,
    find_free_port,
    get_cluster,
    is_port_free,
    make_two_process_flags,
    read_metrics_log,
    start_nodes,
    watch_checkpoints,
)
from tests.processes import find_started, is_running, list_children
from tests.runs import ForkedRun, read_final_files, run_pair

# Imported by each process at its start: fsync for the checkpoint of step 4 is slow.
SLOW_DISK = """
import os, time
real_fsync = os.fsync
def fsync(file):
    if "step-00000004.tmp" in os.readlink(f"/proc/self/fd/{file}"):
        time.sleep(float(os.environ["SLOW_DISK"]))
    real_fsync(file)
os.fsync = fsync
"""


@pytest.fixture
def flags(prepared, tmp_path) -> dict:
    return make_two_process_flags(tmp_path, prepared)


@pytest.fixture
def endless(flags) -> dict:
    return flags | ENDLESS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_run_after_a_save(endless, number):
    endless |= {"dump_interval": 1_000_000}
    command = Command(endless, "-m", "DeBERTa.train")
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    command.process.send_signal(number)
    assert command.finish() == 128 + number, command.printed.read_text()
    assert watch_checkpoints(command)()
    assert not command.find_workers()
    assert "Traceback" not in command.printed.read_text()


def test_usr1_to_the_launcher_saves_and_training_continues(flags):
    command = Command(flags | {"num_training_steps": 300, "dump_interval": 1_000_000, "log_interval": 10})
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    command.process.send_signal(signal.SIGUSR1)
    assert command.finish() == 0, command.printed.read_text()
    early, last = sorted(path.name for path in (command.run_dir / "checkpoints").glob("step-*"))
    assert "step-00000010" <= early < last == "step-00000300"


def test_a_signal_to_launcher_and_processes_at_once(endless):
    """As a service manager ends a job: each process receives it twice, and saves all the same."""
    command = Command(endless | {"dump_interval": 1_000_000})
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    for process in (*command.find_workers().values(), command.process.pid):
        os.kill(process, signal.SIGTERM)
    assert command.finish() == 143, command.printed.read_text()
    assert watch_checkpoints(command)()
    assert not command.find_workers()


def test_a_signal_to_one_process_ends_all(endless):
    port = find_free_port()
    runs = start_nodes(endless | {"nproc_per_node": 1, "dump_interval": 1_000_000}, port)
    runs[0].wait_for(lambda: "step 10/" in runs[0].printed.read_text())
    os.kill(runs[1].find_workers()[1], signal.SIGTERM)
    for node in runs:
        assert node.finish() == 143, node.printed.read_text()
        assert not node.find_workers()
    assert watch_checkpoints(runs[0])()
    assert not watch_checkpoints(runs[1])()  # node 0 writes
    assert is_port_free(port)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared) -> tuple[dict, dict]:
    """Return flags of a run of two ranks that saves at steps 2, 4 and 6, and its final files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(prepared, folder / "data", ignore=shutil.ignore_patterns("valid*", "test*"))
    flags = make_two_process_flags(folder, folder / "data") | {
        "dist_timeout": 60,
        "log_interval": 1,
        "keep_last": 9,
    }
    status, output = run_pair(flags, find_free_port())
    assert status == 0, output
    return flags, read_result(flags["output_dir"])


def read_result(run_dir: Path) -> dict:
    """Return newest weights and moments, final models, and the training lines of the log."""
    files = read_final_files(run_dir)
    return files | {"metrics": [line for line in json.loads(files["metrics"]) if line["kind"] == "train"]}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, prepared) -> Path:
    """Return data whose evaluation takes seconds."""
    data = shutil.copytree(prepared, tmp_path_factory.mktemp("evaluated") / "data")
    for path in data.glob("valid.txt.*"):
        path.unlink()
    shutil.copy(prepared / "train.txt", data / "valid.txt")
    return data


class SlowRun(ForkedRun):
    """A run in which writing the checkpoint of step 4 takes six times `seconds`."""

    def __init__(self, flags: dict, folder: Path, seconds: float, **environment: str) -> None:
        (folder / "sitecustomize.py").write_text(SLOW_DISK)
        path = f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"
        super().__init__(flags, PYTHONPATH=path, SLOW_DISK=str(seconds), **environment)
        self.run_dir = Path(flags["output_dir"])
        self.slow = get_checkpoint_path(self.run_dir, 4).with_suffix(".tmp")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert is_running(self.pid), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def end(self) -> int:
        """Return its exit status; no process of it is left."""
        self.process.join(PATIENCE)
        assert not is_running(self.pid), self.log.read_text()
        assert not find_started(str(self.run_dir))
        return self.finish()[0]


def list_valid_checkpoints(run_dir: Path) -> list[int]:
    """Return the steps of all checkpoints, each of them valid."""
    for step in list_steps(run_dir):
        verify(get_checkpoint_path(run_dir, step))
    return list_steps(run_dir)


def assert_resumes(flags: dict, step: int, expected: dict) -> None:
    """Assert that the same command resumes from `step` and ends with the bits of the undisturbed run."""
    status, output = run_pair(flags, find_free_port())
    assert status == 0, output
    assert f"resuming from step {step}" in output, output
    assert read_result(flags["output_dir"]) == expected
    assert not list(flags["output_dir"].glob("checkpoints/*.tmp"))


def test_a_signal_while_two_processes_evaluate(tmp_path, undisturbed, evaluated):
    """To the command and its processes at once, which counts once: the checkpoint is completed."""
    flags, expected = undisturbed
    flags = flags | {
        "output_dir": tmp_path / "run",
        "data_dir": evaluated,
        "dump_interval": 4,
        "eval_batch_size": 1,
    }
    stopped = SlowRun(flags, tmp_path, 0.2)
    stopped.wait_for(stopped.slow.exists)
    for process in (*list_children(stopped.pid), stopped.pid):
        os.kill(process, signal.SIGTERM)
    assert stopped.end() == 143, stopped.log.read_text()
    assert list_valid_checkpoints(tmp_path / "run") == [4]
    assert {line["kind"] for line in read_metrics_log(tmp_path / "run")} == {"train"}
    assert_resumes(flags | {"eval_batch_size": 300}, 4, expected)
    assert [line["step"] for line in read_metrics_log(tmp_path / "run") if line["kind"] == "valid"] == [4, 6]


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_node_while_two_evaluate(tmp_path, undisturbed, evaluated, node):
    """Both end with its status; node 0 completes a checkpoint that takes longer than `GRACE_SECONDS`."""
    seconds = 1.2 * GRACE_SECONDS / 6 if node == 1 else 0
    change = {"nproc_per_node": 1, "data_dir": evaluated, "dump_interval": 4, "eval_batch_size": 1}
    port = find_free_port()
    runs = []
    for number in (0, 1):
        flags = undisturbed[0] | change | {"output_dir": tmp_path / f"run-{number}"}
        runs.append(SlowRun(flags, tmp_path, seconds, **get_cluster(port, node=number)))
    runs[0].wait_for((runs[0].slow if seconds else get_checkpoint_path(runs[0].run_dir, 4)).exists)
    os.kill(runs[node].pid, signal.SIGTERM)
    assert [run.end() for run in runs] == [143, 143], runs[0].log.read_text() + runs[1].log.read_text()
    assert f"stopped by SIGTERM on node {node}" in runs[1 - node].log.read_text()
    assert list_valid_checkpoints(tmp_path / "run-0") == [4]
    assert {line["kind"] for line in read_metrics_log(tmp_path / "run-0")} == {"train"}


def test_a_signal_while_a_checkpoint_of_two_processes_is_written(tmp_path, undisturbed):
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run"}
    stopped = SlowRun(flags, tmp_path, 0.2)
    stopped.wait_for(stopped.slow.exists)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.end() == 143, stopped.log.read_text()
    *before, last = list_valid_checkpoints(tmp_path / "run")
    assert before == [2, 4]
    assert last in (5, 6)
    assert_resumes(flags, last, expected)


def test_a_second_signal_ends_two_processes_at_once(tmp_path, undisturbed):
    """While a checkpoint is written that would take minutes: the run resumes from the one before."""
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run"}
    stopped = SlowRun(flags, tmp_path, PATIENCE)
    stopped.wait_for(stopped.slow.exists)
    os.kill(stopped.pid, signal.SIGTERM)
    log = tmp_path / "run" / "logs" / "rank-0000.log"
    stopped.wait_for(lambda: "SIGTERM: finishing the step" in log.read_text())
    time.sleep(DUPLICATE_SECONDS)  # an earlier one counts as the same signal
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.end() == 143, stopped.log.read_text()
    assert list_valid_checkpoints(tmp_path / "run") == [2]
    assert_resumes(flags, 2, expected)


def test_a_restarted_run_keeps_its_bits(tmp_path, undisturbed):
    """With `--max_restarts`: one of two ranks is killed while a checkpoint is written."""
    flags, expected = undisturbed
    flags = flags | {"output_dir": tmp_path / "run", "max_restarts": 1}
    disturbed = SlowRun(flags, tmp_path, 0.2)
    disturbed.wait_for(disturbed.slow.exists)
    os.kill(max(list_children(disturbed.pid)), signal.SIGKILL)
    assert disturbed.end() == 0, disturbed.log.read_text()
    printed = disturbed.log.read_text()
    assert "SIGKILL" in printed
    assert "restart 1 of 1" in printed
    assert "resuming from step" in printed
    assert read_result(flags["output_dir"]) == expected
