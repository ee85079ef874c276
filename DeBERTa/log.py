"""Messages of a run: one logger for the package.

`--log_level` sets its level. Modules log to `logging.getLogger(__name__)`, and all messages are written to
stderr. In a run of several ranks, each rank's stderr is its file in logs/, and rank 0 writes to the console
too (`log_rank` in training/worker.py).
"""

import contextlib
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

QUIET_SECONDS = 60.0  # without a message, after which the log says what is running
# Control characters other than the line end, and those that change the direction of text.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_control(text: str) -> str:
    """Escape the control characters of a text, so that a terminal shows them."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class _Output(io.FileIO):
    """A file for messages: those that cannot be written are lost.

    The run continues with a closed terminal, a pipe that nobody reads, and a full disk.
    """

    def write(self, data: Any) -> int:
        """Write as much as possible, and return how many bytes are done with."""
        written = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def open_output(file: int | Path, mode: str = "w") -> TextIO:
    """Open a descriptor or a path for messages.

    Messages that cannot be written are lost. A descriptor stays open when the file is deleted: another file
    would get its number.
    """
    output = _Output(file, mode, closefd=not isinstance(file, int))
    return io.TextIOWrapper(io.BufferedWriter(output), errors="backslashreplace", line_buffering=True)


def secure_console() -> None:
    """Make this process independent of its terminal.

    stdout and stderr can always be written. Call it first in a command. Closed standard descriptors are
    opened, so that no other file gets their numbers.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    streams = {1: sys.stdout, 2: sys.stderr}  # None: closed when Python started, and perhaps in use since
    sys.stdout, sys.stderr = (open_output(n if s else Path(os.devnull)) for n, s in streams.items())


class StderrHandler(logging.Handler):
    """Write records to stderr, above the progress bar if there is one.

    Warnings and errors start with their level. When stderr is not a terminal, each line starts with the time.
    Control characters are escaped, since messages quote what others wrote: texts, files, servers.
    """

    last_time = 0.0  # of the last message, monotonic clock

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, which is lost where it cannot be written."""
        StderrHandler.last_time = time.monotonic()
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        start = "" if sys.stderr.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
        message = escape_control(level + record.getMessage())
        with contextlib.suppress(OSError):
            tqdm.write("\n".join(start + line for line in message.split("\n")), file=sys.stderr)
            sys.stderr.flush()


def set_up_logging(level: str = "info") -> None:
    """Send the package's messages of `level` and above to stderr.

    Calling it again changes the level.
    """
    logger = logging.getLogger("DeBERTa")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(StderrHandler())


@contextlib.contextmanager
def log_regularly(describe: Callable[[], str], seconds: float = QUIET_SECONDS) -> Iterator[None]:
    """Log what `describe` returns whenever there was no other message for `seconds`.

    This is for work that takes long. On a terminal, its progress bar shows that it continues.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=_log_until, args=(is_over, describe, seconds), daemon=True)
    if not sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if thread.is_alive():
            # It may hold the last reference to what `describe` uses, and would free tensors at Python's exit.
            thread.join()


def _log_until(is_over: threading.Event, describe: Callable[[], str], seconds: float) -> None:
    started = time.monotonic()
    while not is_over.wait(max(started, StderrHandler.last_time) + seconds - time.monotonic()):
        if time.monotonic() - max(started, StderrHandler.last_time) >= seconds:
            started = time.monotonic()
            logger.info("%s", describe())
