"""C++ kernels of csrc/, compiled and loaded on first use.

They are called with tensors whose dtype, device and layout are checked.

They are compiled for the machine's processor by `g++` (or `$CXX`) in some seconds and stored in
`$DEBERTA_CACHE/kernels`. `torch.utils.cpp_extension` is not used: it needs ninja, compiles PyTorch's headers
with every source (minutes where this takes seconds), and a process killed while it compiles leaves a lock
that later starts wait for indefinitely.

Callers implement the same in PyTorch's operations, for other dtypes and for machines without a compiler. Both
draw the same dropout masks. Other values differ by rounding.

elementwise.cpp: `compute_probabilities`: sum of content and position scores, softmax, dropout;
`compute_score_gradients`: its backward pass; `apply_dropout`: scaled, added to a residual; `sum_chunk`,
`compute_chunk_gradients`: the head's passes over a chunk of logits; `compute_gelu_gradients`: GELU recomputed
and its gradient, in place; `transpose_matrix`: a matrix in bfloat16, and its column sums.

For bfloat16 on processors with AMX, in attention.cpp: `compute_attention`, `compute_attention_gradients`;
in linear.cpp: `apply_affine`, `compute_affine_gradients`, `apply_feed_forward`,
`compute_feed_forward_gradients`.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from DeBERTa.errors import StorageError
from DeBERTa.files import get_cache_dir, hash_file, open_atomic

FOLDER = Path(__file__).parent / "csrc"
HEADERS = [FOLDER / name for name in ("kernels.h", "tiles.h")]
SOURCES = [FOLDER / f"{name}.cpp" for name in ("elementwise", "attention", "linear")]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += ["-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-mprefer-vector-width=512"] * (platform.machine() == "x86_64")
COMPILE_SECONDS = 120  # at most, each; it takes 3 on an idle machine

COUNT, SEED, REAL = ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
FLOAT, LONG = torch.float32, torch.int64
# Arguments: tensors by dtype (0 and 1 stand for those of the tensors passed to `find_kernel`), and numbers.
ELEMENTWISE_KERNELS: dict[str, list[object]] = {
    "compute_probabilities": [0, 0, 0, 0, torch.bool, COUNT, COUNT, COUNT, SEED, COUNT, COUNT],
    "compute_score_gradients": [0, 0, 0, 0, 0, FLOAT, COUNT, COUNT, COUNT],
    "apply_dropout": [0, 1, 1, COUNT, SEED, COUNT, REAL],
    "sum_chunk": [0, FLOAT, FLOAT, COUNT, COUNT, COUNT],
    "compute_chunk_gradients": [0, FLOAT, FLOAT, LONG, FLOAT, FLOAT, COUNT, COUNT],
    "compute_gelu_gradients": [0, 0, COUNT],
    "transpose_matrix": [0, torch.bfloat16, FLOAT, COUNT, COUNT],
}
TILE_KERNELS: dict[str, list[object]] = {
    "compute_attention": [0, 0, 0, 0, 0, torch.bool, 0, 0, COUNT, COUNT, COUNT, COUNT, SEED, COUNT, REAL],
    "compute_attention_gradients": [0] * 13 + [COUNT, COUNT, COUNT, COUNT, REAL],
    "apply_affine": [0, 1, 1, 0, COUNT, COUNT, COUNT],
    "compute_affine_gradients": [0, 0, 1, 0, 1, 1, COUNT, COUNT, COUNT],
    "apply_feed_forward": [0, 1, 1, 1, 1, 0, COUNT, COUNT, COUNT],
    "compute_feed_forward_gradients": [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, COUNT, COUNT, COUNT],
}
SIGNATURES = ELEMENTWISE_KERNELS | TILE_KERNELS


def find_kernel(name: str, *typed: torch.Tensor) -> Callable[..., None] | None:
    """Return kernel `name` for the dtypes of these CPU tensors, or None.

    It takes contiguous tensors, or None for some, and numbers, and writes into its output arguments. It
    raises TypeError for tensors of another dtype, device or layout.
    """
    if any(type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_cpu for tensor in typed):
        return None
    library, _ = load_library()
    return None if library is None else _find(library, name, tuple(tensor.dtype for tensor in typed))


def find_obstacle() -> str | None:
    """Return why there are no kernels, or None if there are."""
    return load_library()[1]


def has_tiles() -> bool:
    """Return whether the processor has AMX and the system permits it."""
    library, _ = load_library()
    return library is not None and hasattr(library, "request_tiles") and bool(library.request_tiles())


@functools.cache
def _find(library: ctypes.CDLL, name: str, dtypes: tuple[torch.dtype, ...]) -> Callable[..., None] | None:
    symbol = "_".join([name, *(str(dtype).removeprefix("torch.") for dtype in dtypes)])
    function = getattr(library, symbol, None)
    if function is None or (name in TILE_KERNELS and not has_tiles()):
        return None
    expected = [dtypes[kind] if isinstance(kind, int) else kind for kind in SIGNATURES[name]]
    types = [ctypes.c_void_p if isinstance(kind, torch.dtype) else kind for kind in expected]
    function.argtypes, function.restype = [*types, ctypes.c_int], None

    def kernel(*arguments: torch.Tensor | float | None) -> None:
        for number, (x, kind) in enumerate(zip(arguments, expected, strict=True), start=1):
            if isinstance(x, torch.Tensor) and not (x.dtype == kind and x.is_cpu and x.is_contiguous()):
                raise TypeError(
                    f"argument {number} of kernel {name}: not a contiguous {kind} tensor on the CPU"
                )
        values = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        function(*values, torch.get_num_threads())

    return kernel


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the compiled kernels, or None and the reason."""
    name = os.environ.get("CXX", "").strip() or "g++"
    try:
        compiler = shlex.split(name)
        version = _run([*compiler, "--version"])
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: a quote that is not closed
        return None, f"there is no C++ compiler {name}"
    try:
        return _load(compiler, version), None
    except subprocess.CalledProcessError as error:
        lines = [*error.stderr.splitlines(), f"status {error.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        return None, f"{name} cannot compile the kernels: {reason}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the kernels that {name} compiled cannot be used: {error}"


def _load(compiler: list[str], version: str) -> ctypes.CDLL:
    """Load the library for these sources, compiler command and processor.

    It is compiled if it is not in the cache. Its file name contains the SHA-256 of the file: loading a
    truncated library would end the process.
    """
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    key = "\n".join([*texts, shlex.join(compiler), version, *FLAGS, torch.__version__, _describe_processor()])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    cache = get_cache_dir() / "kernels"
    for path in sorted(cache.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{hash_file(path)[:16]}":
            return ctypes.CDLL(str(path.resolve()))
    is_writable = _is_writable(cache)
    with tempfile.TemporaryDirectory(dir=cache if is_writable else None) as folder:
        library = Path(folder, "kernels.so").resolve()
        objects = [str(library.with_name(f"{source.stem}.o")) for source in SOURCES]
        for source, compiled in zip(SOURCES, objects, strict=True):
            _run([*compiler, *FLAGS, "-c", str(source), "-o", compiled])
        # Linked without OpenMP's library: PyTorch has loaded one, and both use the same threads.
        _run([*compiler, "-shared", *objects, "-o", str(library)])
        loaded = ctypes.CDLL(str(library))
        if is_writable:
            path = cache / f"{name}-{hash_file(library)[:16]}.so"
            # A full disk: compiled again at the next start.
            with contextlib.suppress(StorageError), open_atomic(path) as file:
                file.write(library.read_bytes())
    return loaded


def _run(command: list[str]) -> str:
    """Return the output of a command.

    The command runs in its own session, so that signals to this process group do not reach it.
    """
    return subprocess.run(
        command,
        capture_output=True,
        check=True,
        encoding="utf-8",
        env=os.environ | {"LC_ALL": "C"},
        errors="replace",
        start_new_session=True,
        timeout=COMPILE_SECONDS,
    ).stdout


def _is_writable(cache: Path) -> bool:
    """Return whether the cache directory is writable, creating it if it is missing."""
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        return os.access(cache, os.W_OK)
    return False


def _describe_processor() -> str:
    """Return the processor features that the compiler's `native` depends on.

    They are complete as far as the system reports them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
