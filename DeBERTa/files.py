"""The cache directory and atomic writes of files.

A file `x` is written as `x.part` under a lock, and then renamed. The next process overwrites the partial file
of a killed process. On file systems without locks, every process writes a separate partial file.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError

from DeBERTa.errors import DataError, StorageError, describe_os_error

CHUNK_BYTES = 1 << 20
HASH_BYTES = 16 << 20  # hashed at a time: fewer calls take the GIL less often from other threads
MAX_BYTES = 1 << 30  # of a file that is read at once

logger = logging.getLogger(__name__)


def get_cache_dir() -> Path:
    """Return the directory of downloads, prepared data and compiled kernels.

    Raises `StorageError` if nothing says where it is.
    """
    try:
        return Path(os.environ.get("DEBERTA_CACHE") or Path.home() / ".cache" / "DeBERTa")
    except RuntimeError as error:
        message = "no cache directory: HOME is not set, and this user has no home; set DEBERTA_CACHE to one"
        raise StorageError(message) from error


def get_partial_path(path: Path) -> Path:
    """Return the path of a file while it is incomplete."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def raise_storage_errors(
    path: Path, what: str = "", advice: str = "choose a directory that can be written", other: str = "path"
) -> Iterator[None]:
    """Raise `StorageError` in place of `OSError`, naming the file.

    It names `path` where a directory is missing. `what` cannot be written; see `describe_os_error`.
    """
    try:
        yield
    except OSError as error:
        is_partial = str(error.filename) == f"{path}.part"
        if not error.filename or (is_partial and error.errno == errno.ENOENT):
            error.filename = str(path)
        text = describe_os_error(error, advice, other)
        raise StorageError(f"cannot write {what}{': ' if what else ''}{text}") from error


@contextlib.contextmanager
def name_file(path: Path) -> Iterator[Path]:
    """Raise `OSError` with the name of the file in place of any error of writing it.

    The libraries that write tensors hide the system's error: one in the text, one in the context.
    """
    try:
        yield path
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        found = re.search(r"os error (\d+)", str(error))
        number = (isinstance(cause, OSError) and cause.errno) or (int(found[1]) if found else 0)
        reason = os.strerror(number) if number else str(error).partition("\n")[0]
        raise OSError(number or errno.EIO, reason, str(path)) from error


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Return the descriptor of a regular file; the `opener` of `open`.

    Anything else raises `OSError`: a pipe may block, a device may have no end. A link is followed, but not to
    a file that the flags may create.
    """
    no_link = os.O_NOFOLLOW if flags & os.O_CREAT else 0
    descriptor = os.open(path, flags | os.O_NONBLOCK | no_link, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file of at most `MAX_BYTES`.

    Anything else raises `OSError`.
    """
    with open(path, "rb", opener=open_regular) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise OSError(errno.EINVAL, f"more than {MAX_BYTES >> 20} MB", str(path))
        return file.read()


def append_line(path: Path, text: str) -> None:
    """Append a line of text to a file.

    A line that a crash truncated before it stays a line of its own.
    """
    with open(path, "a+b", opener=open_regular) as file:
        file.seek(max(file.tell() - 1, 0))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + text.encode() + b"\n")


@contextlib.contextmanager
def raise_data_errors(path: Path) -> Iterator[None]:
    """Raise `DataError`, naming the file, in place of `OSError` from reading it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot read {path}: {reason}; check its permissions and its disk") from error


@contextlib.contextmanager
def open_partial(path: Path, is_resumed: bool = False, parents: bool = True) -> Iterator[BinaryIO]:
    """Open and lock the partial file of `path`, for `commit` to complete.

    A partial file that is not committed is removed, with the directories that were created for it. With
    `is_resumed`, existing content stays at the start, and a partial file with content is not removed at the
    end. Links are replaced, not written to. `parents`: whether missing directories are created. Raises
    `StorageError` if the file cannot be written, and where `path` is a directory, a pipe or a device.
    """
    partial = get_partial_path(path)
    with raise_storage_errors(path):
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        made = [parent for parent in path.parents if parents and not parent.exists()]
        while True:
            if parents:  # again: the process that held the lock may have removed it
                path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process may rename or remove it
                if not _is_own(partial.lstat()):
                    partial.unlink()
            with open(partial, "a+b", opener=open_regular) as file:
                is_locked = _lock(file, path)
                if not _is_at(partial, file):
                    continue  # the process that held the lock has renamed or removed it
                if not is_locked and not is_resumed and partial == get_partial_path(path):
                    partial.unlink(missing_ok=True)
                    partial = get_partial_path(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
                    continue
                if not is_resumed:
                    file.truncate(0)
                try:
                    yield file
                finally:
                    if is_resumed:
                        file.flush()
                    if _is_at(partial, file) and not (is_resumed and partial.stat().st_size):
                        partial.unlink()
                        _remove_empty(made)
                return


def commit(file: BinaryIO, path: Path) -> None:
    """Flush a partial file to the disk and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    sync(path.parent)


@contextlib.contextmanager
def open_atomic(path: Path, parents: bool = True) -> Iterator[BinaryIO]:
    """Open a new empty file that replaces `path` when the block succeeds.

    The new file is removed when the block fails. `parents`: whether missing directories are created. Raises
    `StorageError` if the file cannot be written.
    """
    with open_partial(path, parents=parents) as file:
        yield file
        commit(file, path)


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock an open file until it is closed.

    Waits while another process holds the lock. Returns False at once on file systems without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that writes %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _is_own(status: os.stat_result) -> bool:
    """Return whether a file has no other name, and is no link, pipe or device."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return whether `path` is the name of this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_regular) as file:
        for chunk in read_chunks(file, HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_chunks(file: IO[bytes], chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the content of a file from its beginning."""
    file.seek(0)
    while chunk := file.read(chunk_bytes):
        yield chunk


def is_recorded(record: Path, values: dict[str, Any]) -> bool:
    """Return whether a JSON file on how other files were made has these values."""
    try:
        return values.items() <= json.loads(read_file(record)).items()
    except (FileNotFoundError, ValueError, AttributeError):
        return False


def remove(path: Path) -> None:
    """Remove a directory with its content, a file or a link, if there is one.

    What a link points to remains.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_unused_path(path: Path) -> Path:
    """Return `path` with the first of the suffixes -1, -2, ... that no file has."""
    number = 1
    while os.path.lexists(numbered := path.with_name(f"{path.name}-{number}")):
        number += 1
    return numbered


def get_state(status: os.stat_result) -> dict[str, int]:
    """Return size (bytes) and modification time (ns), to detect changes of a file."""
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
