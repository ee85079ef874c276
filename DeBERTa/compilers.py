"""The compilers that torch.compile and Triton need.

They are a C++ compiler for a CPU, and for a GPU Triton and a C compiler.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

OLDEST_CAPABILITY = (7, 0)  # that Triton compiles for


def find_compiler_obstacle(device: torch.device) -> str | None:
    """Return why nothing can be compiled for `device`, or None if it can.

    The reason ends with what to do.
    """
    if device.type != "cuda":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        is_missing = shutil.which(compiler) is None
        return f"there is no C++ compiler {compiler}; install it, or name one in CXX" if is_missing else None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        oldest = "{}.{}".format(*OLDEST_CAPABILITY)
        return f"Triton compiles for GPUs of compute capability {oldest} and newer; use a newer GPU"
    # Triton compiles the launcher of its kernels as a Python extension module. It takes CC as one command.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        names = " or ".join(compilers)
        return f"Triton needs a C compiler, and there is no {names}; install it, or name one in CC"
    if not find_python_header():
        return "Triton needs the headers of Python; install them (python3-dev)"
    return None


def find_python_header() -> Path | None:
    """Return the Python.h that a C compiler called by Triton finds, if any."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    directories = [sysconfig.get_path("include", scheme)]
    for name in ("CPATH", "C_INCLUDE_PATH"):
        directories += filter(None, os.environ.get(name, "").split(":"))
    paths = (Path(directory, "Python.h") for directory in directories)
    return next((path for path in paths if path.is_file()), None)


def set_compiler_caches() -> None:
    """Set what Triton and torch.compile need for their caches.

    By default, that of Triton is in the home directory, and that of torch.compile has the user's name. A
    container may have neither.
    """
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111  Path's raises without a home
        directory = Path(tempfile.gettempdir(), f"triton_{os.getuid()}")
        os.environ.setdefault("TRITON_CACHE_DIR", str(directory))
    os.environ.setdefault("USER", str(os.getuid()))
