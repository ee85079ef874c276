"""Lock of a run directory: one process at a time writes there."""

import fcntl
import os
import socket
from pathlib import Path

from DeBERTa.errors import ConfigError, StorageError

LOCK = ".lock"
MAX_HOLDER_BYTES = 200


class RunLock:
    """A lock of a run directory that this process holds until `close` or its end.

    It is a record lock: data workers do not inherit it, and it excludes other machines on a network file
    system. Without file locks nothing is locked. A process loses a record lock when it closes the file, even
    if it opened it twice.
    """

    def __init__(self, run_dir: Path) -> None:
        """Lock `run_dir`.

        Raises `ConfigError` when another process trains there.
        """
        self.run_dir = run_dir
        while True:
            self._file = (run_dir / LOCK).open("a+", errors="replace")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self._file.seek(0)
                holder = "".join(filter(str.isprintable, self._file.read(MAX_HOLDER_BYTES)))
                self._file.close()
                raise ConfigError(
                    f"another process ({holder}) is training in {run_dir}: stop it, or give another --tag"
                ) from None
            except OSError:
                pass  # a file system without locks
            if self.is_held():
                break
            self._file.close()  # it was removed or replaced in the meantime
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def is_held(self) -> bool:
        """Return whether the locked file is still that of the run directory.

        Some network file systems change the inode numbers of files. A file with the time of our last write is
        ours, too.
        """
        ours = os.fstat(self._file.fileno())
        try:
            found = (self.run_dir / LOCK).stat()
        except OSError:
            return False
        return os.path.samestat(ours, found) or ours.st_mtime_ns == found.st_mtime_ns

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
