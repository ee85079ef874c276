"""Processes as the kernel lists them."""

import contextlib
from pathlib import Path


def list_children(process: int) -> list[int]:
    """Return the ids of the processes that its threads have started. A thread may end meanwhile."""
    found = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def find_started(argument: str) -> list[int]:
    """Return the ids of the processes with `argument` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if argument in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
    return found
