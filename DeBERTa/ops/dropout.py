"""Dropout mask of all kernels: bits of SplitMix64, and a numpy reference.

An element uses 16 of the 64 bits of a word, so that p is exact to 2^-16. Word n is a function of n and a
seed (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014). Any thread can draw any
element, and the backward pass draws the mask again instead of saving it. Each call draws its seed from
PyTorch's generator, so that the same seed gives the same masks, also when a layer is recomputed for gradient
checkpointing.
"""

import numpy as np
import torch

BLOCK_WORDS = 1 << 14  # drawn at a time in numpy: they fit in the cache


def draw_seed() -> int:
    """Draw a seed in [0, 2^62) from PyTorch's generator on the host."""
    return int(torch.randint(2**62, (), device="cpu"))


def compute_threshold(p: float) -> int:
    """Return the threshold below which the bits of an element drop it."""
    return round(p * 2**16)


def draw_keep_mask(shape: torch.Size | tuple[int, ...], seed: int, p: float, first: int = 0) -> torch.Tensor:
    """Return bool of `shape` on the host, false with probability `p`.

    `p` is rounded to 2^-16. `first` is the index of the first element.
    """
    mask = np.empty(shape, dtype=bool)
    flat, threshold = mask.reshape(-1), compute_threshold(p)
    for start in range(0, flat.size, 4 * BLOCK_WORDS):
        block = flat[start : start + 4 * BLOCK_WORDS]
        np.greater_equal(_draw_bits(seed, first + start, block.size), threshold, out=block)
    return torch.from_numpy(mask)


def _draw_bits(seed: int, first: int, count: int) -> np.ndarray:
    """Return 16 bits per element from element `first` on, uint16 [count]."""
    words = np.arange(first // 4 + 1, (first + count + 3) // 4 + 1, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words.view(np.uint16)[first % 4 :][:count]
