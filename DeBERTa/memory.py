"""Memory: large temporary tensors on a CPU, and what to do when it runs out."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from DeBERTa.errors import MemoryLimitError

# PyTorch has a class for this error on a GPU only. The texts are of the system, PyTorch, CUDA and cuBLAS.
OUT_OF_MEMORY = re.compile(
    "can(no|')t allocate memory|out of memory|ALLOC_FAILED|NOT_INITIALIZED.*cublasCreate|bad_alloc|"
    "size calculation overflow",
    re.IGNORECASE,
)
REQUEST = re.compile(r"tried to allocate [\d.]+ \w+", re.IGNORECASE)
# Parameters of glibc's mallopt, from its malloc.h; advice of Linux's madvise, from its mman.h.
M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = 1, -1, -2, -4
MADV_HUGEPAGE = 14
CGROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory() -> None:
    """Configure glibc not to return freed memory to the system.

    Every step allocates the same temporary tensors. By default, glibc maps and unmaps each of them, and page
    faults take up to half of a step. Here they come from the heap, which does not shrink. Its future memory
    is requested in huge pages, which fault and miss 512 times less often; no memory is taken before it is
    used.

    PyTorch requests aligned memory. Glibc takes it from a larger block and frees the edges. Saved for quick
    reuse (M_MXFAST, and `glibc.malloc.tcache_count`, which only the environment can set:
    experiments/common.sh does), these never merge with the tensor's memory when it is freed, which is then
    too small for an equal tensor.

    Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_MXFAST, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_TOP_PAD, 64 << 20)
    libc.mallopt(M_MMAP_MAX, 0)
    page, size = os.sysconf("SC_PAGE_SIZE"), measure_memory() // 2
    block = libc.malloc(size)  # the heap's end moves up, and stays there when the block is freed
    if block:
        libc.madvise(-(-block // page) * page, size - page, MADV_HUGEPAGE)
        libc.free(block)


MICRO_BATCHES = (
    "the micro-batches are too large for it, or for its limit (`ulimit -v`, a container); give a larger "
    "--accumulative_update, a smaller --train_batch_size (in evaluation: --eval_batch_size), or "
    "--gradient_checkpointing"
)
MODEL = "the model is too large; give smaller sizes in --model_config, or another --vocab_size"


@contextmanager
def translate_memory_errors(advice: str = MICRO_BATCHES) -> Iterator[None]:
    """Raise `MemoryLimitError` when the memory of the device or of the host ran out."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if "start new thread" in str(error):
            advice = "raise the limit of memory or of processes (ulimit -v, ulimit -u)"
            raise MemoryLimitError(f"no thread can be started: a limit is reached; {advice}") from error
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        request = REQUEST.search(str(error))
        size = f" ({request[0].lower()})" if request else ""
        raise MemoryLimitError(f"out of memory{size}: {advice}") from error


def check_size(size: int, what: str, advice: str) -> None:
    """Raise `MemoryLimitError` if `size` bytes exceed the memory that is available.

    It would take minutes to fill, and then the kernel would kill the process.
    """
    available = min(measure_memory(), read_available_memory())
    if size > available:
        raise MemoryLimitError(
            f"out of memory ({what}: {size / 1e9:,.1f} GB, available: {available / 1e9:,.1f}): {advice}"
        )


def measure_memory() -> int:
    """Return the memory of the host that this process may use, in bytes."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *read_memory_limits()])


def read_available_memory() -> int:
    """Return the memory of the host that can be had without swapping, in bytes."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else measure_memory()


def read_memory_limits() -> list[int]:
    """Return the memory limits of this process's control groups in bytes."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = [CGROUPS / "memory.max", CGROUPS / "memory" / "memory.limit_in_bytes"]  # those of a container
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            path = CGROUPS / group[1:]
            files += [parent / "memory.max" for parent in (path, *path.parents)]
        elif "memory" in controllers.split(","):
            files.append(CGROUPS / "memory" / group[1:] / "memory.limit_in_bytes")
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]
