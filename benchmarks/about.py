"""What every benchmark reports: command, commit, date, machine, versions."""

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe_machine() -> dict:
    """Return the fields that every results file has."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": capabilities.get("cpu_name", platform.machine()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def build_environment() -> dict[str, str]:
    """Return this environment with what `mlm.sh` and `rtd.sh` add to it for training."""
    tunables = re.search(r"glibc\.malloc\.\S+", (ROOT / "experiments" / "common.sh").read_text())
    return os.environ | {"GLIBC_TUNABLES": tunables.group()}


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty= with changes", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
