"""Kernels of our own for CPUs, in kernels.cpp: what takes PyTorch several passes over memory takes these one.

They are compiled for the machine's processor by `g++` (or `$CXX`) when first needed, in some seconds, and kept in
`$DEBERTA_CACHE/kernels` or `~/.cache/DeBERTa/kernels`. Who calls one has the same in PyTorch's operations, for where
there is no such compiler, and for other types. Both draw the same dropout masks; other numbers differ by rounding.

| kernel | called by | what it computes |
| --- | --- | --- |
| probabilities | blocked_attention.py | sum of content and position scores, softmax, dropout |
| score_gradients | blocked_attention.py | the same backwards |
| dropout | dropout.py | dropout, scaled, added to a residual |
| chunk_sums | vocabulary.py | maximum and sums of exponentials of a chunk's logits |
| chunk_gradients | vocabulary.py | their gradients, and the bias's |
| gelu, gelu_gradients | encoder.py | GELU in place; GELU and its gradient |
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from DeBERTa.data.files import cache_dir, sync

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += ["-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-mprefer-vector-width=512"] * (platform.machine() == "x86_64")
COMPILE_SECONDS = 120  # it takes 3 on an idle machine

POINTER, COUNT, SEED, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
SIGNATURES = {
    "probabilities": [POINTER] * 5 + [COUNT] * 3 + [SEED] + [COUNT] * 2,
    "score_gradients": [POINTER] * 6 + [COUNT] * 3,
    "dropout": [POINTER] * 3 + [COUNT, SEED, COUNT, REAL],
    "chunk_sums": [POINTER] * 3 + [COUNT] * 3,
    "chunk_gradients": [POINTER] * 6 + [COUNT] * 2,
    "gelu": [POINTER, COUNT],
    "gelu_gradients": [POINTER] * 2 + [COUNT],
}


def find(name: str, *typed: torch.Tensor) -> Callable[..., None] | None:
    """Kernel `name` for the types of these tensors, or None if there is none, or they are not on a CPU.

    It takes contiguous tensors, or None for some, and numbers, and writes into tensors given.
    """
    if any(tensor.device.type != "cpu" for tensor in typed):
        return None
    return _find(name, tuple(tensor.dtype for tensor in typed))


def obstacle() -> str | None:
    """Why there are no kernels; None if there are."""
    return _library()[1]


@functools.cache
def _find(name: str, types: tuple[torch.dtype, ...]) -> Callable[..., None] | None:
    symbol = "_".join([name, *(str(dtype).removeprefix("torch.") for dtype in types)])
    function = getattr(_library()[0], symbol, None)
    if function is None:
        return None
    function.argtypes = [*SIGNATURES[name], ctypes.c_int]
    function.restype = None

    def kernel(*arguments: torch.Tensor | int | float | None) -> None:
        values = (value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments)
        function(*values, torch.get_num_threads())

    return kernel


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernels, or None and why not."""
    compiler = os.environ.get("CXX") or "g++"
    try:
        return _load(compiler), None
    except FileNotFoundError:
        return None, f"there is no C++ compiler {compiler}"
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} cannot compile kernels.cpp: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"kernels.cpp as {compiler} compiles it cannot be used: {error}"


def _load(compiler: str) -> ctypes.CDLL:
    """Load the library for this source, compiler and processor; compile it if nobody has."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(), version, *FLAGS, torch.__version__, _processor())
    name = f"kernels-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}.so"
    cache = cache_dir() / "kernels"
    if (cache / name).exists():
        return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory(dir=_writable(cache)) as folder:
        compiled, library = Path(folder, "kernels.o"), Path(folder, name)
        # Linked without OpenMP's library: PyTorch has loaded one, and both shall use the same threads.
        compile_only, link = ["-c", str(SOURCE), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(library)]
        for command in ([compiler, *FLAGS, *compile_only], [compiler, *link]):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
        loaded = ctypes.CDLL(str(library))
        sync(library)
        if Path(folder).parent == cache:
            library.replace(cache / name)
    return loaded


def _writable(cache: Path) -> Path | None:
    """The folder to compile in: the cache, or where temporary files go, when the home cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return cache if os.access(cache, os.W_OK) else None


def _processor() -> str:
    """What the compiler's `native` depends on, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
