"""Console messages: one logger for the package, its level set by `--log_level`."""

import logging
import sys

from tqdm import tqdm

LEVELS = ("debug", "info", "warning", "error")


class ConsoleHandler(logging.Handler):
    """Write records to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


class ConsoleFormatter(logging.Formatter):
    """Prefix warnings and errors with their level; add timestamps when stderr is not a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line to print."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        stamp = "" if sys.stderr.isatty() else f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} "
        return f"{stamp}{level}{record.getMessage()}"


def set_up_logging(level: str = "info") -> None:
    """Send the package's messages of `level` and above to stderr. Calling it again changes the level."""
    logger = logging.getLogger("DeBERTa")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        handler = ConsoleHandler()
        handler.setFormatter(ConsoleFormatter())
        logger.addHandler(handler)
