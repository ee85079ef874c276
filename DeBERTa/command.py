"""What all commands share: messages and exit status."""

import logging
import sys
from collections.abc import Callable

from DeBERTa.errors import DebertaError, ReportedError, describe_os_error
from DeBERTa.log import secure_console, set_up_logging

logger = logging.getLogger(__name__)


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command, log its error, and return its exit status.

    It is what the command returns, 1 after an error, 2 for wrong flags, 130 after an interrupt, which is
    logged as `interrupted`.
    """
    if sys.stdout is None or sys.stderr is None:  # closed when Python started
        secure_console()
    set_up_logging()
    try:
        return command() or 0
    except DebertaError as error:
        if not isinstance(error, ReportedError):
            logger.error("%s", error)
        return error.exit_status
    except OSError as error:  # a full disk, a directory that cannot be written
        logger.error("%s", describe_os_error(error))
        return 1
    except KeyboardInterrupt:
        logger.error("%s", interrupted)
        return 130
