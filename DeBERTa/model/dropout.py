"""Dropout whose random numbers cost little more than the mask.

On a CPU the library's generator is the cost: 13 ns an element, many times that of a softmax. Here an element takes 16
of the 64 bits of a word, so that p is exact to 2^-16. Word n is a function of n and a seed (SplitMix64: Steele, Lea and
Flood, Fast Splittable Pseudorandom Number Generators, 2014), so that any thread can draw any part, and the backward
pass draws the mask again rather than keep it. Each call takes its seed from PyTorch's generator: the same seed gives
the same masks, also when a layer is computed again for gradient checkpointing. GPUs and compiled layers use the
library's dropout.
"""

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from DeBERTa.model import kernels

BLOCK_WORDS = 1 << 14  # drawn at once without the kernel: they stay in the cache


def draw_seed() -> int:
    """From PyTorch's generator, in [0, 2^62)."""
    return int(torch.randint(2**62, (), device="cpu"))


def drop_threshold(p: float) -> int:
    """Elements whose 16 random bits, as a number, are below this are dropped."""
    return round(p * 2**16)


def keep_mask(shape: torch.Size | tuple[int, ...], seed: int, p: float, first: int = 0) -> torch.Tensor:
    """bool, on the CPU: false with probability `p`, rounded to 2^-16, by the bits of elements `first` on."""
    mask = np.empty(shape, dtype=bool)
    flat, threshold = mask.reshape(-1), drop_threshold(p)
    for start in range(0, flat.size, 4 * BLOCK_WORDS):
        part = flat[start : start + 4 * BLOCK_WORDS]
        np.greater_equal(_random_bits(seed, first + start, part.size), threshold, out=part)
    return torch.from_numpy(mask)


def _random_bits(seed: int, first: int, count: int) -> np.ndarray:
    """16 bits for each element from number `first` on, uint16 [count]; kernels.cpp draws the same."""
    words = np.arange(first // 4 + 1, (first + count + 3) // 4 + 1, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words.view(np.uint16)[first % 4 :][:count]


def _dropped(
    x: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype, seed: int, p: float
) -> torch.Tensor:
    """`residual + x * mask / (1 - p)`, or without residual, in `dtype`."""
    x = x.contiguous()
    residual = None if residual is None else residual.to(dtype).expand_as(x).contiguous()
    out = torch.empty_like(x, dtype=dtype)
    kernel = kernels.find("dropout", x, out)
    if kernel is not None:
        kernel(x, residual, out, x.numel(), seed, drop_threshold(p), 1 / (1 - p))
        return out
    kept = (x * keep_mask(x.shape, seed, p).to(x.dtype)).mul_(
        1 / (1 - p)
    )  # a boolean mask is several times slower
    return torch.add(kept, 0 if residual is None else residual, out=out)


class _Dropout(torch.autograd.Function):
    """Keeps the seed alone."""

    @staticmethod
    def forward(ctx, residual, x, seed, p):
        ctx.seed, ctx.p, ctx.type = seed, p, x.dtype
        return _dropped(
            x,
            residual,
            x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype),
            seed,
            p,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dresidual = grad if ctx.needs_input_grad[0] else None
        return dresidual, _dropped(grad, None, ctx.type, ctx.seed, ctx.p), None, None


class Dropout(nn.Module):
    """Zero elements with probability `p` and scale the rest by 1 / (1 - p), in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if not self._draws_words(x):
            return F.dropout(x, self.p)
        return _Dropout.apply(None, x, draw_seed(), self.p)

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + dropout(x)` in one pass over memory."""
        if not self.training or self.p == 0 or not self._draws_words(x):
            return residual + self(x)
        return _Dropout.apply(residual, x, draw_seed(), self.p)

    @staticmethod
    def _draws_words(x: torch.Tensor) -> bool:
        """The compiler cannot look into the kernels, and draws fast numbers of its own."""
        return x.device.type == "cpu" and not torch.compiler.is_compiling()
