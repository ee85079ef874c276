"""Messages: level, times, and lines above the progress bar."""

import fcntl
import logging
import os
import re
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import pytest
from tqdm import tqdm

from DeBERTa.log import log_regularly, open_output, set_up_logging

logger = logging.getLogger("DeBERTa.test")


@pytest.fixture(autouse=True)
def restored_level():
    package = logging.getLogger("DeBERTa")
    level, propagate = package.level, package.propagate
    yield
    package.setLevel(level)
    package.propagate = propagate


@contextmanager
def open_terminal(shown: list[str]) -> Iterator[None]:
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
    with open_terminal(shown), tqdm(total=3, desc="training") as bar:
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
    """On a full disk, in a pipe without a reader, on a terminal that was closed."""
    set_up_logging("info")
    reader, writer = os.pipe()
    screen, keyboard = os.openpty()
    os.close(reader)
    os.close(screen)
    for file in (Path("/dev/full"), writer, keyboard):
        with open_output(file) as output, redirect_stderr(output):
            logger.info("lost")
            with tqdm(total=3) as bar:
                bar.update()
    os.close(writer)
    os.close(keyboard)


def test_what_can_be_written_is_written(tmp_path):
    """A pipe that takes a part of a message at a time, and characters that the encoding lacks."""
    text = "x" * 200_000
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # a full pipe loses messages; the run does not wait
    with open_output(writer) as output:
        output.write(text)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        received = pipe.read()
    assert 0 < len(received) < len(text)
    assert set(received) == {"x"}
    for _ in range(2):
        with open_output(tmp_path / "log", "a") as output:
            print("a\udcff", file=output)
    assert (tmp_path / "log").read_text() == "a\\udcff\n" * 2


def test_long_work_is_reported_unless_there_are_other_messages(capsys):
    set_up_logging("info")
    with log_regularly(lambda: "half done", seconds=0.01):
        text = ""
        while text.count("half done") < 3:
            text += capsys.readouterr().err
    assert text.splitlines()[0][20:] == "half done"
    with log_regularly(lambda: "half done", seconds=60.0):
        logger.info("done")
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == ["done"]


def test_no_thread_outlives_long_work():
    """Python aborts the process if a thread frees tensors while it exits."""
    set_up_logging("info")
    started, before = threading.Event(), set(threading.enumerate())

    def describe() -> str:
        started.set()
        time.sleep(0.2)
        return "half done"

    with log_regularly(describe, seconds=0.01):
        assert started.wait(60)
    assert set(threading.enumerate()) <= before


def test_control_characters_of_others_are_escaped(capsys):
    set_up_logging("info")
    logger.info("piece \x1b[31m\x07\x9b31m\u202e and\ta tab\nnext line, Straße, 漢字")
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert lines == [r"piece \x1b[31m\x07\x9b31m\u202e and\ta tab", "next line, Straße, 漢字"]


def test_a_descriptor_outlives_its_file():
    """The process replaces `sys.stderr`; descriptor 2 must not go to the next file that is opened."""
    reader, writer = os.pipe()
    open_output(writer).write("first\n")
    os.write(writer, b"second\n")
    os.close(writer)
    with open(reader) as file:  # noqa: PTH123 (a descriptor)
        assert file.read() == "first\nsecond\n"
