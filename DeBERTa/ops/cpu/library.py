"""The C++ kernels of csrc/: compiled when first needed, loaded, and called with checked tensors.

They are compiled for the machine's processor by `g++` (or `$CXX`) in some seconds and stored in `$DEBERTA_CACHE/kernels`.
`torch.utils.cpp_extension` is not used: it needs ninja, compiles PyTorch's headers with every source (minutes where
this takes seconds), and a process killed while it compiles leaves a lock that later starts wait for without end.

Callers have the same in PyTorch's operations, for other types and for machines without a compiler. Both draw the same
dropout masks; other values differ by rounding.

elementwise.cpp: `probabilities`: sum of content and position scores, softmax, dropout; `score_gradients`: its backward
pass; `dropout`: scaled, added to a residual; `chunk_sums`, `chunk_gradients`: the head's passes over a chunk of logits;
`gelu_gradients`: GELU recomputed and its gradient, in place; `transposed`: a matrix in bfloat16, and its column sums.

For bfloat16 on processors with AMX, in attention.cpp: `attention` and `attention_gradients`: all of it; in linear.cpp:
`affine` and `affine_gradients`, `feed_forward` and `feed_forward_gradients`.
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

from DeBERTa.data.files import get_cache_dir, hash_file, sync

FOLDER = Path(__file__).parent / "csrc"
HEADERS = [FOLDER / name for name in ("kernels.h", "tiles.h")]
SOURCES = [
    FOLDER / f"{name}.cpp"
    for name in ("kernels", "fused_attention", "linear_maps", "vocabulary", "optimizer")
]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += ["-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-mprefer-vector-width=512"] * (platform.machine() == "x86_64")
COMPILE_SECONDS = 120  # each; it takes 3 on an idle machine

COUNT, SEED, REAL, FINE = ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_double
# Arguments: tensors, by their type (0 and 1 stand for those of the tensors that `find` was asked for), and numbers.
SIGNATURES = {
    "probabilities": [0, 0, 0, 0, torch.bool, COUNT, COUNT, COUNT, SEED, COUNT, COUNT],
    "score_gradients": [0, 0, 0, 0, 0, torch.float32, COUNT, COUNT, COUNT],
    "dropout": [0, 1, 1, COUNT, SEED, COUNT, REAL],
    "chunk_sums": [0, torch.float32, torch.float32, COUNT, COUNT, COUNT],
    "chunk_gradients": [
        0,
        torch.float32,
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
        COUNT,
        COUNT,
    ],
    "gelu_gradients": [0, 0, COUNT],
    "transposed": [0, torch.bfloat16, torch.float32, COUNT, COUNT],
    "attention": [0, 0, 0, 0, 0, torch.bool, 0, 0, COUNT, COUNT, COUNT, COUNT, SEED, COUNT, REAL],
    "attention_gradients": [0] * 13 + [COUNT, COUNT, COUNT, COUNT, REAL],
    "affine": [0, 1, 1, 0, COUNT, COUNT, COUNT],
    "affine_gradients": [0, 0, 1, 0, 1, 1, COUNT, COUNT, COUNT],
    "feed_forward": [0, 1, 1, 1, 1, 0, COUNT, COUNT, COUNT],
    "feed_forward_gradients": [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, COUNT, COUNT, COUNT],
    "vocabulary_sums": [0, 1, 1, torch.int64, *[torch.float32] * 3, COUNT, COUNT, COUNT, COUNT],
    "vocabulary_gradients": [0, 1, 1, torch.int64, *[torch.float32] * 5, COUNT, COUNT, COUNT],
    "gradient_norm": [0, torch.int64, torch.float32, COUNT],
    "adamw": [0, torch.int64, COUNT, *[FINE] * 6],
}
# Those of fused_attention.cpp, linear_maps.cpp and vocabulary.cpp.
FOR_TILES = {
    "attention",
    "attention_gradients",
    "affine",
    "affine_gradients",
    "feed_forward",
    "feed_forward_gradients",
}
FOR_TILES |= {"vocabulary_sums", "vocabulary_gradients"}


def find(name: str, *typed: torch.Tensor) -> Callable[..., None] | None:
    """Kernel `name` for the types of these tensors, or None if there is none, or they are not plain ones on a CPU.

    It takes contiguous tensors, or None for some, and numbers, and writes into tensors given. It raises TypeError for
    tensors of another type, device or layout.
    """
    if any(
        type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu" for tensor in typed
    ):
        return None
    return _find(name, tuple(tensor.dtype for tensor in typed))


def obstacle() -> str | None:
    """Why there are no kernels; None if there are."""
    return _library()[1]


@functools.cache
def tiles() -> bool:
    """Whether the kernels for processors with AMX can be used: it is one, and the system lets this process."""
    library = _library()[0]
    return hasattr(library, "tiles_allowed") and bool(library.tiles_allowed())


@functools.cache
def _find(name: str, types: tuple[torch.dtype, ...]) -> Callable[..., None] | None:
    symbol = "_".join([name, *(str(dtype).removeprefix("torch.") for dtype in types)])
    function = getattr(_library()[0], symbol, None)
    if function is None or (name in FOR_TILES and not tiles()):
        return None
    expected = [types[kind] if isinstance(kind, int) else kind for kind in SIGNATURES[name]]
    function.argtypes = [ctypes.c_void_p if isinstance(kind, torch.dtype) else kind for kind in expected]
    function.argtypes = [*function.argtypes, ctypes.c_int]
    function.restype = None

    def kernel(*arguments: torch.Tensor | int | float | None) -> None:
        values = []
        for number, (value, kind) in enumerate(zip(arguments, expected, strict=True), start=1):
            if isinstance(value, torch.Tensor):
                if value.dtype != kind or value.device.type != "cpu" or not value.is_contiguous():
                    raise TypeError(
                        f"argument {number} of kernel {name} has to be a contiguous {kind} tensor on the CPU"
                    )
                value = value.data_ptr()
            values.append(value)
        function(*values, torch.get_num_threads())

    return kernel


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernels, or None and why not."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    try:
        version = _run([*compiler, "--version"])
    except (OSError, subprocess.SubprocessError):
        return None, f"there is no C++ compiler {shlex.join(compiler)}"
    try:
        return _load(compiler, version), None
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        return None, f"{shlex.join(compiler)} cannot compile the kernels: {said[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the kernels as {shlex.join(compiler)} compiles them cannot be used: {error}"


def _load(compiler: list[str], version: str) -> ctypes.CDLL:
    """Load the library for this source, compiler and processor; compile it if nobody has.

    Its file's name holds the file's own SHA-256, too: to load one that was cut short would end the process.
    """
    parts = (
        *(path.read_text() for path in (*HEADERS, *SOURCES)),
        version,
        *FLAGS,
        torch.__version__,
        _processor(),
    )
    name = f"kernels-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"
    cache = _writable(get_cache_dir() / "kernels")
    for library in sorted((get_cache_dir() / "kernels").glob(f"{name}-*.so")):
        if library.stem == f"{name}-{hash_file(library)[:16]}":
            return ctypes.CDLL(str(library.resolve()))
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        library = Path(folder, "kernels.so").resolve()
        compiled = [Path(folder, f"{source.stem}.o").resolve() for source in SOURCES]
        for source, to in zip(SOURCES, compiled, strict=True):
            _run([*compiler, *FLAGS, "-c", str(source), "-o", str(to)])
        # Linked without OpenMP's library: PyTorch has loaded one, and both shall use the same threads.
        _run([*compiler, "-shared", *map(str, compiled), "-o", str(library)])
        loaded = ctypes.CDLL(str(library))
        if cache is not None:
            with contextlib.suppress(OSError):  # a full disk: compiled again at the next start
                sync(library)
                library.replace(cache / f"{name}-{hash_file(library)[:16]}.so")
                sync(cache)
    return loaded


def _run(command: list[str]) -> str:
    """What a command prints. A signal to this process is not for the compiler."""
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
