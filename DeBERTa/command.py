"""What the small commands share: messages and exit status."""

import logging
from collections.abc import Callable

from DeBERTa.errors import DebertaError, describe_os_error
from DeBERTa.log import set_up_logging

logger = logging.getLogger(__name__)


def run_command(command: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit status.

    It is 0 on success, 1 after an error, 2 for wrong flags, 130 after an interrupt, which is logged as
    `interrupted`.
    """
    set_up_logging()
    try:
        command()
    except DebertaError as error:
        logger.error("%s", error)
        return error.exit_status
    except OSError as error:
        logger.error("%s", describe_os_error(error))
        return 1
    except KeyboardInterrupt:
        logger.error("%s", interrupted)
        return 130
    return 0
