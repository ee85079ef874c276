"""Failures of ranks.

A rank records its failure in a file. Its launcher reads it and publishes it to the other nodes.
"""

import json
import signal
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from DeBERTa.errors import DebertaError
from DeBERTa.processes import STOP_SIGNALS


@dataclass(frozen=True)
class Failure:
    """Reason why a rank, and with it an attempt at the run, ended."""

    message: str
    exit_status: int = 1
    is_retryable: bool = False
    is_consequence: bool = False  # of the failure of another rank
    is_explained: bool = False  # the message is written for users and needs no log
    node: int = 0
    time: float = field(default_factory=time.time)  # seconds since the epoch

    @staticmethod
    def from_error(error: Exception) -> "Failure":
        """Return the failure of a rank that ends with `error`."""
        if not isinstance(error, DebertaError):
            return Failure(f"{type(error).__name__}: {error}")
        is_consequence = error.is_consequence
        return Failure(str(error), error.exit_status, error.is_retryable, is_consequence, not is_consequence)

    @staticmethod
    def from_exit_code(code: int, record: Path | None = None) -> "Failure":
        """Return the failure of a rank from its exit code, and its record, if any.

        The exit code is negative for a signal.
        """
        stop_signal = get_stop_signal(code)
        if stop_signal:
            return Failure(f"stopped by {signal.Signals(stop_signal).name}", 128 + stop_signal)
        if code < 0:
            is_named = -code in {number.value for number in signal.Signals}  # real-time signals are not
            name = signal.Signals(-code).name if is_named else f"signal {-code}"
            return Failure(f"killed by {name}", is_retryable=True)
        try:
            text = record.read_bytes() if record else b""
        except OSError:
            text = b""
        return _parse(text) or Failure(f"exited with status {code}", is_retryable=True)

    @staticmethod
    def from_json(text: str | bytes) -> "Failure":
        """Read a failure that `to_json` wrote, on this machine or another one.

        Anything else, for example one with status 0, is a failure, too.
        """
        return _parse(text) or Failure("another node reported a failure that cannot be read")

    def to_json(self) -> str:
        """Return all fields as one line of JSON."""
        return json.dumps(asdict(self))

    @property
    def is_stop(self) -> bool:
        """Return whether a signal requested the end."""
        return get_stop_signal(self.exit_status) != 0

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key: causes before stops before consequences, then by time."""
        return (2 if self.is_consequence else 1 if self.is_stop else 0), self.time


def _parse(text: str | bytes) -> Failure | None:
    """Return the failure that `to_json` wrote, or None for any other text."""
    try:
        failure = Failure(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    are_valid = all(type(getattr(failure, item.name)) is item.type for item in fields(Failure))
    return failure if are_valid and 0 < failure.exit_status < 256 else None


def get_stop_signal(code: int) -> int:
    """Return the stop signal of an exit code, or 0 if there is none.

    For example, 143 and -15 are SIGTERM.
    """
    return next((int(number) for number in STOP_SIGNALS if code in (128 + number, -number)), 0)
