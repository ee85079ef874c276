"""Messages of a run: one logger for the package.

`--log_level` sets its level. Modules log to `logging.getLogger(__name__)`, and all messages are written to
stderr. In a run of several ranks, each rank's stderr is its file in logs/, and rank 0 writes to the console
too (`log_rank` in training/worker.py).
"""

import contextlib
import logging
import re
import sys

from tqdm import tqdm

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
# Control characters other than the line end, and those that change the direction of text.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class StderrHandler(logging.Handler):
    """Write records to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record.

        On a full disk or a closed pipe the message is lost, and the run continues.
        """
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


class LineFormatter(logging.Formatter):
    """Prefix warnings and errors with their level.

    When stderr is not a terminal, each line starts with the time. Control characters are escaped, since
    messages quote what others wrote: texts, files, servers.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the text to write."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        time = "" if sys.stderr.isatty() else f"{self.formatTime(record, TIME_FORMAT)} "
        message = CONTROL.sub(lambda match: ascii(match[0])[1:-1], record.getMessage())
        return "\n".join(time + line for line in f"{level}{message}".split("\n"))


def set_up_logging(level: str = "info") -> None:
    """Send the package's messages of `level` and above to stderr.

    Calling it again changes the level.
    """
    logger = logging.getLogger("DeBERTa")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        handler = StderrHandler()
        handler.setFormatter(LineFormatter())
        logger.addHandler(handler)
