"""Dropout, scaled and added to a residual, in one pass over memory."""

import torch
from torch.autograd.function import once_differentiable

from DeBERTa.ops.cpu import library
from DeBERTa.ops.dropout import compute_threshold, draw_keep_mask, draw_seed


def add_dropout(residual: torch.Tensor | None, x: torch.Tensor, p: float) -> torch.Tensor:
    """Return `residual + dropout(x)`, or `dropout(x)` alone, for 0 < p < 1."""
    return _Dropout.apply(residual, x, draw_seed(), p)


class _Dropout(torch.autograd.Function):
    """Dropout that saves its seed instead of its mask for the backward pass."""

    @staticmethod
    def forward(ctx, residual, x, seed, p):
        ctx.seed, ctx.p, ctx.dtype = seed, p, x.dtype
        dtype = x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)
        return _apply_mask(x, residual, dtype, seed, p)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_residual = grad if ctx.needs_input_grad[0] else None
        return grad_residual, _apply_mask(grad, None, ctx.dtype, ctx.seed, ctx.p), None, None


def _apply_mask(
    x: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype, seed: int, p: float
) -> torch.Tensor:
    """Return `residual + x * mask / (1 - p)`, or without residual, in `dtype`."""
    x = x.contiguous()
    residual = None if residual is None else residual.to(dtype).expand_as(x).contiguous()
    out = torch.empty_like(x, dtype=dtype)
    kernel = library.find_kernel("apply_dropout", x, out)
    if kernel is not None:
        kernel(x, residual, out, x.numel(), seed, compute_threshold(p), 1 / (1 - p))
        return out
    mask = draw_keep_mask(x.shape, seed, p).to(x.dtype)  # a boolean mask is several times slower
    scaled = (x * mask).mul_(1 / (1 - p))
    return torch.add(scaled, 0 if residual is None else residual, out=out)
