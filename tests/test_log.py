"""Messages: level, times, and lines above the progress bar."""

import fcntl
import io
import logging
import os
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import pytest
from tqdm import tqdm

from DeBERTa.log import set_up_logging

logger = logging.getLogger("DeBERTa.test")


@pytest.fixture(autouse=True)
def restored_level():
    package = logging.getLogger("DeBERTa")
    level, propagate = package.level, package.propagate
    yield
    package.setLevel(level)
    package.propagate = propagate


@contextmanager
def terminal(shown: list[str]) -> Iterator[None]:
    """Make stderr a terminal; what it shows is appended to `shown` at the end."""
    screen, keyboard = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(keyboard, "w") as stderr, redirect_stderr(stderr):
        yield
    with suppress(OSError):  # the end of the output
        while True:
            shown.append(os.read(screen, 1 << 16).decode())
    os.close(screen)


def test_lines_have_times_when_stderr_is_not_a_terminal(capsys):
    set_up_logging("info")
    logger.info("first\nsecond")
    logger.warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[20:] for line in lines] == ["first", "second", "warning: careful"]


def test_a_terminal_shows_no_times_and_messages_above_the_bar():
    set_up_logging("info")
    shown: list[str] = []
    with terminal(shown), tqdm(total=3, desc="training") as bar:
        bar.update()
        logger.error("no room")
    text = "".join(shown)
    assert "error: no room\r\n" in text
    assert text.rindex("training:") > text.rindex("no room")  # the bar is drawn again below the message


def test_the_level_hides_less_severe_messages(capsys):
    set_up_logging("warning")
    logger.info("hidden")
    logger.warning("shown")
    set_up_logging("debug")  # no second handler, another level
    logger.debug("details")
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == ["warning: shown", "details"]


def test_a_message_that_cannot_be_written_is_lost_without_an_error():
    set_up_logging("info")
    full = Path("/dev/full").open("w")  # noqa: SIM115 (closing it fails too)
    with redirect_stderr(full):
        logger.info("lost")
    with suppress(OSError):
        full.close()
    closed = io.StringIO()
    closed.close()
    with redirect_stderr(closed):
        logger.info("lost")


def test_control_characters_of_others_are_escaped(capsys):
    set_up_logging("info")
    logger.info("piece \x1b[31m\x07\x9b31m\u202e and\ta tab\nnext line, Straße, 漢字")
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert lines == [r"piece \x1b[31m\x07\x9b31m\u202e and\ta tab", "next line, Straße, 漢字"]
