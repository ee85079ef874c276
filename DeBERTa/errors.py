"""Errors that users see: one sentence `what: why; what to do`, lower case, without a full stop."""


class DebertaError(Exception):
    """The base class: the command prints the message and ends with `exit_status`.

    `is_retryable`: starting again from the last checkpoint may succeed (`--max_restarts`).
    `is_consequence`: the failure of another rank explains this one.
    """

    exit_status = 1
    is_retryable = False
    is_consequence = False


class ConfigError(DebertaError, ValueError):
    """Settings, model configs, flags or environment variables that cannot work."""


class UsageError(ConfigError):
    """A command line that cannot be read: a flag, preset or combination of them that does not exist."""

    exit_status = 2


class DataError(DebertaError, ValueError):
    """Text or prepared data that is missing, damaged, or not what the settings need."""


class VocabularyError(DebertaError, ValueError):
    """A vocabulary that cannot be read, or that does not match the data or the model."""


class StorageError(DebertaError):
    """A file cannot be written or read: a full disk, permissions, a lost mount."""


class DamagedCheckpointError(DebertaError):
    """A checkpoint with a file that is missing or differs from what was written."""


class NonFiniteError(DebertaError):
    """Losses, gradients or weights became NaN or infinite, and stayed so."""


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


def describe_os_error(error: OSError) -> str:
    """Return a message that names the file, and why the system refused it."""
    return f"{error.filename or 'input or output'}: {error.strerror or error}"
