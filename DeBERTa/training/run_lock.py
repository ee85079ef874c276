"""Lock of a run directory: one process at a time writes there."""

import fcntl
import logging
import math
import os
import socket
import time
from pathlib import Path

from DeBERTa.errors import ConfigError, StorageError
from DeBERTa.files import open_regular

LOCK = ".lock"
MAX_HOLDER_BYTES = 200
LEASE_SECONDS = 120  # NFS 4.0 releases the locks of a machine that does not answer after 90, by default

logger = logging.getLogger(__name__)


class RunLock:
    """A lock of a run directory that this process holds until `close` or its end.

    It is a record lock: data workers do not inherit it, and it excludes other machines on a network file
    system. There, the lock of a machine that has failed ends some time later: it is waited for. Without file
    locks nothing is locked. A process loses a record lock when it closes the file, even if it opened it
    twice.
    """

    def __init__(self, run_dir: Path) -> None:
        """Lock `run_dir`.

        Raises `ConfigError` when another process trains there.
        """
        self.run_dir = run_dir
        deadline = math.inf
        while True:
            self._file = open(run_dir / LOCK, "a+", errors="replace", opener=open_regular)  # noqa: SIM115
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self._file.seek(0)
                holder = "".join(filter(str.isprintable, self._file.read(MAX_HOLDER_BYTES)))
                self._file.close()
                busy = f"another process ({holder}) is training in {run_dir}"
                is_here = holder.endswith(f" on {socket.gethostname()}")
                if is_here or time.monotonic() > deadline:
                    raise ConfigError(f"{busy}: stop it, or give another --tag") from None
                if deadline == math.inf:
                    deadline = time.monotonic() + LEASE_SECONDS
                    logger.warning("%s, or its machine failed: waiting up to %d s", busy, LEASE_SECONDS)
                time.sleep(1)
                continue
            except OSError:
                pass  # a file system without locks
            if self.is_held():
                break
            self._file.close()  # it was removed or replaced in the meantime
        if os.fstat(self._file.fileno()).st_nlink == 1:  # it is no other file, too
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def is_held(self) -> bool:
        """Return whether the locked file is still that of the run directory.

        Some network file systems change the inode numbers of files. A file whose time changes with that of
        ours is ours, too; a copy has the time of before.
        """
        path, descriptor = self.run_dir / LOCK, self._file.fileno()
        try:
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return True
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime_ns == path.lstat().st_mtime_ns
        except OSError:
            return False

    def check(self) -> None:
        """Raise `StorageError` if the run directory may be another run's."""
        if not self.is_held():
            raise StorageError(
                f"the run directory {self.run_dir} is no longer locked by this run: it was moved, removed or "
                f"replaced, or its {LOCK} was; put it back, then the same command resumes from its last "
                "checkpoint"
            )

    def close(self) -> None:
        """Release the lock."""
        self._file.close()
