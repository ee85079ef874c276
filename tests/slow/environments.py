"""Environments that share this Python's packages, except for those that are installed in front of them."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def make_environment(folder: Path, alone: list[str], packages: list[str]) -> str:
    """Make an environment with `packages`, and `alone` without their dependencies; return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    if alone:
        subprocess.run([*install, "--no-deps", *alone], check=True)
    if packages:
        subprocess.run([*install, *packages], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)
