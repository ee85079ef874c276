"""Dropout whose random numbers cost little more than the mask.

On a CPU the library's generator is the cost: 13 ns an element, many times that of a softmax. Here an element takes 16
of the 64 bits of a word, so that p is exact to 2^-16. Words come in blocks, each from a generator of its own, drawn by
two threads. Each call takes its seed from PyTorch's generator: the same seed gives the same masks, also when a layer is
computed again for gradient checkpointing. GPUs and compiled layers use the library's dropout.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BLOCK_WORDS = 1 << 16
second_thread = ThreadPoolExecutor(1)  # numpy lets go of the interpreter while it draws


def _renew_second_thread() -> None:
    """A forked process has the pool, but not its thread."""
    global second_thread
    second_thread = ThreadPoolExecutor(1)


os.register_at_fork(after_in_child=_renew_second_thread)


def keep_mask(out: torch.Tensor, p: float) -> torch.Tensor:
    """Fill contiguous CPU tensor `out` with 0 (probability `p`, rounded to 2^-16) and 1; returns it."""
    seed = int(torch.randint(2**62, ()))
    # 16 random bits read as a signed number: a share of p lies below the threshold.
    threshold = round(p * 2**16) - 2**15
    parts = out.view(-1).split(4 * BLOCK_WORDS)
    words = [-(-part.numel() // 4) for part in parts]
    odd = second_thread.submit(_draw, seed, range(1, len(parts), 2), words) if len(parts) > 1 else None
    drawn = _draw(seed, range(0, len(parts), 2), words)
    if odd is not None:
        drawn |= odd.result()
    for block, part in enumerate(parts):
        torch.ge(torch.from_numpy(drawn[block].view(np.int16)[: part.numel()]), threshold, out=part)
    return out


def _draw(seed: int, blocks: range, words: list[int]) -> dict[int, np.ndarray]:
    """Random words uint64 of some blocks."""
    generators = {block: np.random.SFC64([seed, block]) for block in blocks}
    return {b: generator.random_raw(words[b]) for b, generator in generators.items()}


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
        mask = keep_mask(torch.empty_like(x, memory_format=torch.contiguous_format), self.p)
        return x * mask * (1 / (1 - self.p))

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + dropout(x)` in one pass over memory."""
        if not self.training or self.p == 0 or not self._draws_words(x):
            return residual + self(x)
        mask = keep_mask(torch.empty_like(x, memory_format=torch.contiguous_format), self.p)
        return torch.addcmul(residual, x, mask, value=1 / (1 - self.p))

    @staticmethod
    def _draws_words(x: torch.Tensor) -> bool:
        """The compiler cannot look into numpy, and draws fast numbers of its own."""
        return x.device.type == "cpu" and not torch.compiler.is_compiling()
