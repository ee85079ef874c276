"""The cache directory, and files that are written completely or not at all.

A file `x` is written as `x.part` under a lock, and then renamed. What a killed process leaves under that name
is overwritten by the next one. On file systems without locks, every process writes a partial file of its own.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from DeBERTa.errors import StorageError

CHUNK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


def get_cache_dir() -> Path:
    """Return the directory of downloads, prepared data and compiled kernels."""
    return Path(os.environ.get("DEBERTA_CACHE") or Path.home() / ".cache" / "DeBERTa")


def get_partial_path(path: Path) -> Path:
    """Return the name that a file has until it is complete."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def raise_storage_errors(path: Path) -> Iterator[None]:
    """Raise `StorageError`, naming the file, in place of `OSError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            "free space there, or choose a directory that can be written"
        ) from error


@contextlib.contextmanager
def open_partial(path: Path, resume: bool = False) -> Iterator[BinaryIO]:
    """Open and lock the partial file of `path`, for `commit` to complete.

    A partial file that is not committed is removed. With `resume`, its content is neither discarded at first
    nor removed at the end. Raises `StorageError` if the file cannot be written.
    """
    partial = get_partial_path(path)
    with raise_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with partial.open("a+b") as file:
                is_locked = _lock(file, path)
                if not _is_at(partial, file):
                    continue  # the process that held the lock has renamed or removed it
                if not is_locked and not resume and partial == get_partial_path(path):
                    partial.unlink(missing_ok=True)
                    partial = get_partial_path(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
                    continue
                if not resume:
                    file.truncate(0)
                try:
                    yield file
                finally:
                    if resume:
                        file.flush()
                    if _is_at(partial, file) and not (resume and partial.stat().st_size):
                        partial.unlink()
                return


def commit(file: BinaryIO, path: Path) -> None:
    """Rename a partial file to `path` once its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    sync(path.parent)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a new empty file that replaces `path` when the block succeeds.

    It is removed when the block fails. Raises `StorageError` if the file cannot be written.
    """
    with open_partial(path) as file:
        yield file
        commit(file, path)


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock an open file until it is closed; wait for other processes that have locked it.

    Returns False at once on file systems without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that writes %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return whether `path` is the name of this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def hash_file(path: Path, chunk_bytes: int = CHUNK_BYTES) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Large chunks disturb other threads less.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


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
    while (numbered := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return numbered


def get_state(status: os.stat_result) -> dict[str, int]:
    """Return size and modification time, which show whether a file has changed."""
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
