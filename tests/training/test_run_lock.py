"""The lock of a run directory: a run that lost its directory stops and harms nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from DeBERTa.errors import ConfigError, StorageError
from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify
from DeBERTa.training.run_lock import LOCK, RunLock
from tests.runs import ForkedRun, run, tiny_flags


def move(run_dir: Path) -> Path:
    return run_dir.rename(run_dir.with_name("moved"))


def remove_lock(run_dir: Path) -> Path:
    (run_dir / LOCK).unlink()
    return run_dir


def replace_lock(run_dir: Path) -> Path:
    shutil.copy(run_dir / LOCK, run_dir / "copy")
    (run_dir / "copy").replace(run_dir / LOCK)
    return run_dir


def move_and_copy(run_dir: Path) -> Path:
    """With all times, as `cp -a` does."""
    return shutil.copytree(move(run_dir), run_dir)


def link_lock(run_dir: Path) -> Path:
    (run_dir / LOCK).rename(run_dir / "file")
    (run_dir / LOCK).symlink_to("file")
    return run_dir


def remove_all(run_dir: Path) -> Path:
    shutil.rmtree(
        move(run_dir)
    )  # moved first: the run may write a file into a directory that is being removed
    return run_dir


CHANGES = [move, remove_lock, replace_lock, remove_all, move_and_copy, link_lock]


@pytest.mark.parametrize("change", CHANGES)
def test_a_lock_that_is_no_longer_the_directorys_is_noticed(tmp_path, change):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = RunLock(run_dir)
    lock.check()
    change(run_dir)
    assert not lock.is_held()
    with pytest.raises(StorageError, match=r"the run directory .*/run is no longer locked by this run: "):
        lock.check()
    lock.close()


def test_a_file_system_that_changes_inode_numbers(tmp_path, monkeypatch):
    """A network file system may: the same file seems to be another one, with the same times."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    lock = RunLock(tmp_path)
    lock.check()
    lock.close()


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write(f"process 1 on {sys.argv[2]}\\n")
    file.flush()
    print("locked", flush=True)
    time.sleep(2)
"""


@pytest.mark.parametrize("host", ["another-machine", socket.gethostname()])
def test_a_lock_of_another_machine_is_waited_for(tmp_path, host, caplog):
    """A network file system releases that of a machine that failed after some time, here 2 seconds."""
    command = [sys.executable, "-c", HOLD, tmp_path / LOCK, host]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        busy = (
            rf"another process \(process 1 on {re.escape(host)}\) is training in {re.escape(str(tmp_path))}"
        )
        if host == socket.gethostname():
            with pytest.raises(ConfigError, match=f"{busy}: stop it"):
                RunLock(tmp_path)
            assert process.poll() is None
        else:
            RunLock(tmp_path).close()
            assert re.fullmatch(f"{busy}, or its machine failed: waiting up to 120 s", caplog.messages[0])


def test_a_lock_that_is_not_released(tmp_path, monkeypatch):
    monkeypatch.setattr("DeBERTa.training.run_lock.LEASE_SECONDS", 0.5)
    command = [sys.executable, "-c", HOLD, tmp_path / LOCK, "another-machine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ConfigError, match="stop it, or give another --tag"):
            RunLock(tmp_path)


def test_a_directory_that_returns_is_locked_again(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = RunLock(run_dir)
    move(run_dir).rename(run_dir)
    lock.check()
    lock.close()


@pytest.fixture
def started() -> Iterator[list[ForkedRun]]:
    """Return a list of runs, which are killed in the end, also those that are stopped."""
    runs: list[ForkedRun] = []
    yield runs
    for forked in runs:
        if forked.process.is_alive():
            os.kill(forked.pid, signal.SIGKILL)
            forked.finish()


def read_files(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("change", "log_interval"), [(move, 1000), (remove_lock, 1), (remove_all, 1000)])
def test_a_run_in_the_directory_of_another_stops(tmp_path, prepared, started, change, log_interval):
    """With status 1 at the next save or line of the log; it leaves the other run alone."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 100_000, "keep_last": 1}
    flags |= {"dump_interval": 20, "log_interval": log_interval}
    run_dir = flags["output_dir"]
    for number, step in enumerate((60, 80)):
        started.append(ForkedRun(flags, live=True, log=tmp_path / f"{number}.log"))
        started[-1].wait_for(
            f"step {step}/"
        )  # it writes a checkpoint, but does not hold the lock of best.json
        os.kill(started[-1].pid, signal.SIGSTOP)
        if number == 0:
            moved = change(run_dir)
            saved = list_steps(moved)
    files = read_files(run_dir)
    os.kill(started[0].pid, signal.SIGCONT)
    status, output = started[0].finish()
    assert status == 1, output
    message = output.splitlines()[-1]
    assert message.startswith(f"error: the run directory {run_dir} is no longer locked by this run")
    assert "Traceback" not in output
    assert read_files(run_dir) == files
    if moved != run_dir:
        assert list_steps(moved) == saved
        verify(get_checkpoint_path(moved, saved[-1]))


def test_a_run_whose_directory_is_removed_stops(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 100_000, "dump_interval": 20}
    removed = ForkedRun(flags, live=True)
    removed.wait_for("step 40/")
    remove_all(flags["output_dir"])
    status, output = removed.finish()
    assert status == 1, output
    assert "is no longer locked by this run" in output.splitlines()[-1]
    assert not flags["output_dir"].exists()


def test_the_final_models_go_to_a_locked_directory(tmp_path, prepared):
    """The directory disappears after the last checkpoint, in the last evaluation."""
    flags = tiny_flags(tmp_path, prepared, "MLM")
    ended = ForkedRun(flags, live=True)
    ended.wait_for("step-00000006")
    os.kill(ended.pid, signal.SIGSTOP)
    moved = move(flags["output_dir"])
    os.kill(ended.pid, signal.SIGCONT)
    status, output = ended.finish()
    assert not flags["output_dir"].exists()
    if not (moved / "model").exists():  # it had not ended before it was stopped
        assert status == 1, output
    flags["output_dir"] = moved
    assert run(flags)[0] == 0


@pytest.mark.parametrize(
    ("name", "kind"), [(LOCK, "directory"), (LOCK, "pipe"), (LOCK, "link"), ("checkpoints", "file"),
                       ("checkpoints", "link")]
)  # fmt: skip
def test_a_file_of_another_type(tmp_path, prepared, name, kind):
    """Nothing is changed, not even the file that a link points to."""
    flags = tiny_flags(tmp_path, prepared, "MLM")
    flags["output_dir"].mkdir()
    path, precious = flags["output_dir"] / name, tmp_path / "precious"
    (flags["output_dir"] / "metrics.jsonl").write_text('{"step": 1}\n')
    precious.write_text("text")
    {
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "file": path.touch,
        "link": lambda: path.symlink_to(precious if name == LOCK else path),
    }[kind]()
    before = sorted(flags["output_dir"].iterdir())
    status, output = run(flags)
    assert status == 1
    wanted = "file, which no link may stand for" if name == LOCK else "directory"
    assert output.splitlines()[-1] == f"error: {path} must be a {wanted}; remove it"
    assert sorted(flags["output_dir"].iterdir()) == before
    assert precious.read_text() == "text"


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_linked_lock_is_not_written(tmp_path, link):
    """Also where it replaces a file after the types of files were checked."""
    (tmp_path / "precious").write_text("text")
    link(tmp_path / LOCK, tmp_path / "precious")
    if link == Path.symlink_to:
        with pytest.raises(OSError, match="symbolic links"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).close()
    assert (tmp_path / "precious").read_text() == "text"
