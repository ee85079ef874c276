"""Errors that users see.

A message is one sentence `what: why; what to do`, lower case, without a period.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, an exhausted quota
# What is at the path is of another kind: more space or another permission would not help.
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EINVAL)


class DebertaError(Exception):
    """The base class of all errors of the package.

    The command logs the message and exits with `exit_status`.

    `is_retryable`: starting again from the last checkpoint may succeed (`--max_restarts`).
    `is_consequence`: the failure of another rank explains this one.
    """

    exit_status = 1
    is_retryable = False
    is_consequence = False


class ConfigError(DebertaError, ValueError):
    """Settings, model configs, flags or environment variables that cannot work."""


class UsageError(ConfigError):
    """A command line that cannot be parsed.

    It has an unknown flag, an unknown preset or an invalid combination of flags.
    """

    exit_status = 2


class DataError(DebertaError, ValueError):
    """Text or prepared data that is missing, damaged, or not what the settings need."""


class DamagedStoreError(DataError):
    """Token ids that changed on the disk after they were written."""

    is_retryable = True


class DownloadError(DataError):
    """A file that cannot be fetched, or that is not the right one."""


class VocabularyError(DebertaError, ValueError):
    """A vocabulary that cannot be read, or that does not match the data or the model."""


class StorageError(DebertaError):
    """A file cannot be written or read: a full disk, permissions, a lost mount."""


class DamagedCheckpointError(DebertaError):
    """A checkpoint with a file that is missing or differs from what was written."""


class NonFiniteError(DebertaError):
    """Losses, gradients or weights became NaN or infinite, and stayed NaN or infinite."""


class MemoryLimitError(DebertaError):
    """The memory of the device or of the host is too small for what the settings need."""


class LaunchError(DebertaError):
    """The nodes of a run cannot start together, or a rank of the run failed."""


class PeerLostError(DebertaError):
    """Another rank died, was stopped, or cannot be reached."""

    is_retryable = True
    is_consequence = True


class DataWorkerError(DebertaError):
    """A data worker died."""

    is_retryable = True


class ReportedError(DebertaError):
    """An error that was logged and passed to the launcher already."""


def describe_os_error(error: OSError, advice: str = "", other: str = "path") -> str:
    """Return a message with the file, the reason of the failure and what to do.

    A full disk has its free space, and freeing it before `advice`. Where the reason is too many open files,
    the limit of the size of files, or what is at the path, the advice is another one; `other`: what to give
    another of.
    """
    reason = str(error.strerror or error)
    if error.errno in FULL and error.filename and not Path(error.filename).is_char_device():
        space, freed = describe_free_space(Path(error.filename))
        reason += f" ({space})" if space else ""
        advice = f"free {freed} there{', or ' if advice else ''}{advice}"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "raise `ulimit -n`"
    elif error.errno == errno.EFBIG:
        advice = f"raise `ulimit -f`, or give another {other} on a file system for larger files"
    elif error.errno in IN_THE_WAY:
        advice = f"remove what is in the way, or give another {other}"
    return f"{error.filename or 'input or output'}: {reason}{'; ' if advice else ''}{advice}"


def describe_free_space(path: Path) -> tuple[str, str]:
    """Return what is free on the disk of a file, and what to free.

    The file may be missing. What is free is empty if it is not known; to free are "space" or "inodes".
    """
    with contextlib.suppress(OSError):
        existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
        status = os.statvfs(existing)
        if status.f_files and not status.f_favail:
            return "no inodes free", "inodes"
        return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB free", "space"
    return "", "space"
