"""The compilers that torch.compile and Triton need.

That is C++ for a CPU, and Triton, which needs one of C, for a GPU.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from DeBERTa.files import get_cache_dir

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
        return "Triton compiles for GPUs of compute capability {}.{} and newer".format(*OLDEST_CAPABILITY)
    # What launches a kernel is compiled on the machine, as a module of Python.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler ({' or '.join(compilers)}); install it, or name one in CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    if not (Path(sysconfig.get_path("include", scheme)) / "Python.h").is_file():
        return "Triton needs the headers of Python; install them (python3-dev)"
    return None


def set_compiler_caches() -> None:
    """Set where Triton and torch.compile store what they compile.

    What the environment says stays. By default, Triton takes a directory in the home directory, and
    torch.compile one with the user's name. In a container, a user may have neither.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(get_cache_dir() / "triton"))
    temporary = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary))
