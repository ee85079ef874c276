"""Where files lie, and writing them so that others see them whole or not at all, and one process at a time writes each.

A file `x` is written as `x.part` under a lock and then renamed. What a killed process leaves under that name is written
over by the next one.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20


def cache_dir() -> Path:
    """Where downloads, prepared data and compiled kernels lie."""
    return Path(os.environ.get("DEBERTA_CACHE") or Path.home() / ".cache" / "DeBERTa")


def lock(file: BinaryIO, name: Path) -> None:
    """Wait until no other process holds this open file; closing it gives it up.

    On file systems that have no locks it returns at once: files are still whole then, but work may be done twice.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that works on {name}", file=sys.stderr)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass


def partial_path(path: Path) -> Path:
    """The name a file has until it is complete."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def open_partial(path: Path) -> Iterator[BinaryIO]:
    """The partial file of `path`, open to append, with what it holds already, locked against other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    while True:
        with partial.open("a+b") as file:
            lock(file, path)
            # The process waited for may have renamed the file since it was opened here.
            if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                continue
            yield file
            return


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A new empty file that becomes `path` when the block ends well, and is removed when it does not."""
    with open_partial(path) as file:
        file.truncate(0)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial_path(path).replace(path)
        except BaseException:
            partial_path(path).unlink(missing_ok=True)
            raise


def file_sha256(path: Path, chunk_bytes: int = CHUNK_BYTES) -> str:
    """SHA-256 of a file, in hexadecimal. Large chunks disturb other threads less."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unused_name(path: Path) -> Path:
    """`path` with the first of -1, -2, ... behind it that nothing has yet."""
    number = 1
    while (numbered := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return numbered
