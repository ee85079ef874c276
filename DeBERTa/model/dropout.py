"""Dropout whose random numbers cost little more than the mask.

On a CPU the library's generator is the cost: 13 ns an element, many times that of a softmax. Here an element takes 16
of the 64 bits of a word, so that p is exact to 2^-16. Words come in blocks that fit into the cache, each from a
generator of its own. Each call takes its seed from PyTorch's generator: the same seed gives the same masks, also when a
layer is computed again for gradient checkpointing. GPUs and compiled layers use the library's dropout.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BLOCK_WORDS = 1 << 16


def keep_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """bool, on the CPU: false with probability `p`, rounded to 2^-16."""
    mask = torch.empty(shape, dtype=torch.bool)
    threshold = _threshold(p)
    for part, bits in _bits(mask):
        torch.ge(bits, threshold, out=part)
    return mask


def negate_dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """Give elements of contiguous CPU tensor `x`, none below zero, a minus sign with probability `p`; returns it."""
    threshold = _threshold(p)
    low, high = max(-(2**15), threshold - 2**15), min(2**15 - 1, threshold + 2**15 - 1)
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    for part, bits in _bits(x):
        # The sign of bits - threshold, kept from overflowing.
        signs = bits.clamp_(low, high).sub_(threshold).to(integer).bitwise_and_(torch.iinfo(integer).min)
        part.view(integer).bitwise_or_(signs)
    return x


def _threshold(p: float) -> int:
    """16 random bits read as a signed number: a share of p lies below this."""
    return round(p * 2**16) - 2**15


def _bits(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of contiguous `x`, one-dimensional, and random int16 for each, of the same shape."""
    seed = int(torch.randint(2**62, ()))
    for block, part in enumerate(x.view(-1).split(4 * BLOCK_WORDS)):
        words = np.random.SFC64([seed, block]).random_raw(-(-part.numel() // 4))
        yield part, torch.from_numpy(words.view(np.int16)[: part.numel()])


class _MaskedAdd(torch.autograd.Function):
    """`residual + x * mask * scale`, or without residual; keeps a byte an element, the mask."""

    @staticmethod
    def forward(ctx, residual, x, mask, scale):
        ctx.save_for_backward(mask)
        ctx.scale, ctx.type = scale, x.dtype
        mask = mask.to(x.dtype)  # products with booleans are several times slower
        return x * mask * scale if residual is None else torch.addcmul(residual, x, mask, value=scale)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        dresidual = grad if ctx.needs_input_grad[0] else None
        return dresidual, (grad * mask.to(grad.dtype)).mul_(ctx.scale).to(ctx.type), None, None


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
        return _MaskedAdd.apply(None, x, keep_mask(x.shape, self.p), 1 / (1 - self.p))

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + dropout(x)` in one pass over memory."""
        if not self.training or self.p == 0 or not self._draws_words(x):
            return residual + self(x)
        return _MaskedAdd.apply(residual, x, keep_mask(x.shape, self.p), 1 / (1 - self.p))

    @staticmethod
    def _draws_words(x: torch.Tensor) -> bool:
        """The compiler cannot look into numpy, and draws fast numbers of its own."""
        return x.device.type == "cpu" and not torch.compiler.is_compiling()
