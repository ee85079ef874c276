"""Memory of large temporary tensors on a CPU."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt, from its malloc.h; advice of Linux's madvise, from its mman.h.
M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = 1, -1, -2, -4
MADV_HUGEPAGE = 14


def keep_freed_memory() -> None:
    """Spare page faults, which by default take up to half of a step's time.

    Every step allocates the same temporary tensors, and glibc maps and unmaps each of them. Here they come from the
    heap, which keeps what is freed. What the heap will grow into is asked to be in huge pages, which fault and miss 512
    times less often; no memory is taken before it is used.

    PyTorch asks for aligned memory; glibc cuts that out of a larger block and frees the edges. Kept apart for quick
    reuse (M_MXFAST, and `glibc.malloc.tcache_count`, which only the environment can set: experiments/common.sh does),
    these never join the tensor's memory again when it is freed, which then is too small for an equal tensor.

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
    page = os.sysconf("SC_PAGE_SIZE")
    size = page * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)  # the heap's end moves up, and stays there when the block is freed
    if block:
        libc.madvise(-(-block // page) * page, size - page, MADV_HUGEPAGE)
        libc.free(block)
