"""What all commands share: messages and exit status."""

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from DeBERTa.errors import DebertaError, ReportedError, StorageError, describe_os_error
from DeBERTa.log import secure_console, set_up_logging
from DeBERTa.memory import translate_memory_errors
from DeBERTa.processes import RunInterrupted, raise_interrupts

logger = logging.getLogger(__name__)


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command, log its error, and return its exit status.

    It is what the command returns, 1 after an error, 2 for wrong flags, 128 plus its number after a signal,
    which is logged as `interrupted`.
    """
    if sys.stdout is None or sys.stderr is None:  # closed when Python started
        secure_console()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters of the text
            stream.reconfigure(errors="backslashreplace")
    set_up_logging()
    try:
        with raise_interrupts(), translate_memory_errors("raise its limit (`ulimit -v`, a container)"):
            try:
                return command() or 0
            finally:
                write_output("")  # what is not written yet, such as the text of --help
    except DebertaError as error:
        if not isinstance(error, ReportedError):
            logger.error("%s", error)
        return error.exit_status
    except OSError as error:  # a full disk, a directory that cannot be written
        logger.error("%s", describe_os_error(error))
        return 1
    except KeyboardInterrupt as error:
        logger.error("%s", interrupted)
        return error.exit_status if isinstance(error, RunInterrupted) else 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            discard_unwritten(stream)


def write_output(text: str) -> None:
    """Write to standard output at once.

    Raises `StorageError` where that is not possible.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise StorageError(f"standard output: {error.strerror}") from error


def discard_unwritten(stream: TextIO) -> None:
    """Discard what cannot be written.

    Python would try it again at its end, and fail with a traceback.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
