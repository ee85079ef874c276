"""Check that Python and the packages of requirements.txt are there.

This runs before anything imports them.
"""

import importlib.util
import os
import sys

PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")


def find_missing() -> "list[str]":
    """Return the names of the packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Exit with one sentence if this Python is too old or lacks packages.

    It does so, too, if the current directory is gone. To be called by commands alone, of which DeBERTa.doctor
    lists the packages itself.
    """
    if sys.version_info < (3, 10):  # noqa: UP036  # that is what is checked
        sys.exit("error: Python {}.{} is too old: use 3.10 or newer".format(*sys.version_info))
    try:
        os.getcwd()  # noqa: PTH109 (works on any Python)
    except FileNotFoundError:
        sys.exit("error: the current directory was removed: change to another")
    missing = find_missing()
    if missing and "DeBERTa.doctor" not in sys.orig_argv:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(missing)}: activate a Python that has them "
            "(source .venv/bin/activate), or pip install -r requirements.txt"
        )
