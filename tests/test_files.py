"""Files that are written completely or not at all, by one process at a time."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa.config import read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.data.vocabulary import find_or_train_vocabulary
from DeBERTa.errors import ConfigError, DataError, StorageError, VocabularyError
from DeBERTa.files import (
    MAX_BYTES,
    append_line,
    commit,
    find_unused_path,
    get_cache_dir,
    get_partial_path,
    hash_file,
    is_recorded,
    open_atomic,
    open_partial,
    raise_storage_errors,
    read_file,
)
from DeBERTa.report.read import read_run
from tests.conftest import ROOT, strip_times

GOLDEN = Path(__file__).parent / "golden" / "prepare"


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file"
    with open_atomic(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_older_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"older")
    with pytest.raises(TypeError), open_atomic(path) as file:
        file.writelines([b"newer", "not bytes"])
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_remains_of_a_killed_process_are_overwritten(tmp_path):
    path = tmp_path / "file"
    get_partial_path(path).write_bytes(b"incomplete and longer")
    with open_atomic(path) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_partial_file_can_be_resumed(tmp_path, is_committed):
    path = tmp_path / "file"
    for content in (b"one ", b"two"):
        with open_partial(path, is_resumed=True) as file:
            file.write(content)
            if is_committed and content == b"two":
                commit(file, path)
    written = path if is_committed else get_partial_path(path)
    assert written.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [written]


def test_an_empty_partial_file_is_removed(tmp_path):
    with open_partial(tmp_path / "file", is_resumed=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error():
    with (
        pytest.raises(
            StorageError, match=r"cannot write /there: No space left on device \([\d,.]+ MB free\); free"
        ),
        raise_storage_errors(Path("/there")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"content")


SMALL = """
import pathlib, subprocess, sys
from DeBERTa.command import run_command
from DeBERTa.files import open_atomic
folder = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", folder], check=True)
def write():
    with open_atomic(folder / "x"):
        pass
run_command(write)
"""


def test_a_disk_without_inodes(tmp_path):
    """More space would not help.

    The test fails where the system forbids to mount in a namespace of its own.
    """
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", SMALL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"unshare or mount not permitted, or it failed: {done.stderr}"
    reason = "No space left on device (no inodes free); free inodes there, or choose a directory that can be"
    assert strip_times(done.stderr) == f"error: cannot write {tmp_path}/x.part: {reason} written\n"


def test_a_small_file_needs_little_memory(tmp_path):
    """Also where the memory is limited; what does not fit is one sentence."""
    (tmp_path / "x").write_bytes(b"x" * 1000)
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MAX_BYTES)
    code = (
        "import resource, sys; from DeBERTa.command import run_command; from DeBERTa.files import "
        "read_file; resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9)); "
        "block = bytearray(10**9); sys.exit(run_command(lambda: len(read_file(sys.argv[1])) - 1000))"
    )
    for name, status, output in (
        ("x", 0, ""),
        ("large", 1, "error: out of memory: raise its limit (`ulimit -v`, a container)"),
    ):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert strip_times(done.stderr).startswith(output)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    """More space would not help."""
    path = Path("/dev/null") if kind == "device" else tmp_path / "path"
    if kind != "device":
        (Path.mkdir if kind == "directory" else os.mkfifo)(path)
    before = path.stat().st_mode
    reason = "not a regular file; remove what is in the way, or give another path"
    with pytest.raises(StorageError, match=f"^cannot write {path}: {reason}$"), open_atomic(path):
        pass
    assert path.stat().st_mode == before


def test_a_path_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as error, open_atomic(tmp_path / "file" / "below"):
        pass
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno in (errno.EEXIST, errno.ENOTDIR)


def _append_once(path: Path, barrier, number: int, has_locks: bool) -> None:
    if not has_locks:  # as on a Lustre file system mounted without them, which a test cannot mount

        def fail(*_):
            raise OSError(errno.ENOSYS, "no locks")

        fcntl.flock = fail
    barrier.wait()
    with open_partial(path) as file:
        content = path.read_bytes() if path.exists() else b""
        file.write(content + b"%d\n" % number)
        commit(file, path)


@pytest.mark.parametrize("has_locks", [True, False])
def test_one_process_writes_at_a_time(tmp_path, has_locks):
    """Without locks, the file is that of one process, and complete."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    path = tmp_path / "file"
    processes = [
        context.Process(target=_append_once, args=(path, barrier, number, has_locks)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    numbers = sorted(path.read_text().split())
    assert numbers == ["0", "1", "2", "3"] if has_locks else set(numbers) <= {"0", "1", "2", "3"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", ["", "one\n", "one"])
def test_a_line_is_appended_after_a_truncated_one(before, tmp_path):
    path = tmp_path / "lines"
    path.write_text(before)
    append_line(path, "two")
    append_line(path, "three")
    assert path.read_text().splitlines() == [*before.splitlines(), "two", "three"]


def test_unused_paths(tmp_path):
    assert find_unused_path(tmp_path / "file") == tmp_path / "file-1"
    (tmp_path / "file-1").mkdir()
    assert find_unused_path(tmp_path / "file") == tmp_path / "file-2"


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path))
    assert get_cache_dir() == tmp_path
    monkeypatch.delenv("DEBERTA_CACHE")
    assert get_cache_dir() == Path.home() / ".cache" / "DeBERTa"


def test_a_user_without_home_directory(monkeypatch):
    monkeypatch.delenv("DEBERTA_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # a user that no password file knows
    with pytest.raises(StorageError, match=r"HOME is not set.*set DEBERTA_CACHE"):
        get_cache_dir()


def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch):
    """A pipe would block, a device has no end; a file without data may be as large as the disk."""
    monkeypatch.setattr("DeBERTa.files.MAX_BYTES", 1 << 20)
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file") == read_file(tmp_path / "link") == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for read in (read_file, hash_file, lambda path: is_recorded(path, {})):
            with pytest.raises(OSError, match=f"not a regular file: '{path}'"):
                read(path)
    os.truncate(tmp_path / "file", (1 << 20) + 1)
    with pytest.raises(OSError, match="more than 1 MB"):
        read_file(tmp_path / "file")


def test_a_pipe_does_not_block_the_start(tmp_path):
    """In place of a config, a vocabulary, its record, metrics and samples."""
    for name in ("config.json", "spm.model", "spm.model.json", "metrics.jsonl", "samples.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=r"config\.json: not a readable JSON file \(not a regular file\)"):
        read_json(tmp_path / "config.json")
    with pytest.raises(VocabularyError, match=r"spm\.model: not a regular file; check"):
        Tokenizer(tmp_path / "spm.model")
    with pytest.raises(StorageError, match=r"cannot write .*spm\.model\.json: not a regular file; remove"):
        find_or_train_vocabulary([GOLDEN / "input.txt"], 300, tmp_path / "spm.model")
    with pytest.raises(DataError, match="no metrics"):
        read_run(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe"])
def test_what_is_elsewhere_is_not_written_to(tmp_path, kind, resume):
    path, precious = tmp_path / "file", tmp_path / "precious"
    partial = get_partial_path(path)
    precious.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(partial)
    elif kind == "hard link":
        partial.hardlink_to(precious)
    else:
        partial.symlink_to(precious if kind == "link" else tmp_path / "none")
    with open_partial(path, resume) as file:
        file.write(b"content")
        commit(file, path)
    assert (path.read_bytes(), precious.read_bytes()) == (b"content", b"precious")
    assert sorted(tmp_path.iterdir()) == [path, precious]
