"""Dropout whose random numbers cost little more than the mask.

On a CPU the library's generator is the cost: 13 ns an element, many times that of a softmax. Here an element takes 16
of the 64 bits of a word, so that p is exact to 2^-16. Each call seeds its own generator from PyTorch's: the same seed
gives the same masks, also when a layer is computed again for gradient checkpointing. GPUs use the library's dropout.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CHUNK_WORDS = 1 << 13  # drawn and compared at once: they stay in the cache, and one thread does it without a barrier


def keep_mask(out: torch.Tensor, p: float) -> torch.Tensor:
    """Fill contiguous CPU tensor `out` with 0 (probability `p`, rounded to 2^-16) and 1; returns it."""
    flat = out.view(-1)
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
    # 16 random bits read as a signed number: a share of p lies below the threshold.
    threshold = round(p * 2**16) - 2**15
    for part in flat.split(4 * CHUNK_WORDS):
        drawn = generator.integers(0, 2**64, size=-(-part.numel() // 4), dtype=np.uint64).view(np.int16)
        torch.ge(torch.from_numpy(drawn[: part.numel()]), threshold, out=part)
    return out


class Dropout(nn.Module):
    """Zero elements with probability `p` and scale the rest by 1 / (1 - p), in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        mask = keep_mask(torch.empty_like(x, memory_format=torch.contiguous_format), self.p)
        return x * mask * (1 / (1 - self.p))

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + dropout(x)` in one pass over memory."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return residual + self(x)
        mask = keep_mask(torch.empty_like(x, memory_format=torch.contiguous_format), self.p)
        return torch.addcmul(residual, x, mask, value=1 / (1 - self.p))
