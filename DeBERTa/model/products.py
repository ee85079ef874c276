"""Matrix products of linear maps with the factors laid out as a CPU multiplies them fastest in bfloat16.

There a product whose factors are both stored row by row takes about two thirds of the time that one takes which has to
turn a factor around. A kernel of kernels.cpp does that first, in less time than is saved. Elsewhere these are the
products of `F.linear`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from DeBERTa.model import kernels


def transposed(x: torch.Tensor, dtype: torch.dtype, sums: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [N, K] as [K, N] in `dtype`; in new memory, row by row, only where that makes products faster. `sums` float32
    [K] takes those over N."""
    kernel = kernels.find("transposed", x) if dtype == torch.bfloat16 else None
    if kernel is None:
        if sums is not None:
            torch.sum(x, 0, dtype=sums.dtype, out=sums)
        return x.to(dtype).t()
    out = x.new_empty(x.size(1), x.size(0), dtype=dtype)
    kernel(x.contiguous(), out, sums, *x.shape)
    return out


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x weight^T + bias` [..., N] of `x` [..., K] and `weight` [N, K], in the type of `x`."""
    columns = transposed(weight, x.dtype)
    return torch.addmm(bias.to(x.dtype), x.flatten(0, -2), columns).unflatten(0, x.shape[:-1])


def affine_gradients(grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight [N, K] and bias [N], summed over all rows of `grad` [..., N] and `x` [..., K], of one type;
    the bias's in float32, or in float64 for that."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    dbias = grad.new_empty(grad.size(1), dtype=torch.promote_types(grad.dtype, torch.float32))
    return transposed(grad, grad.dtype, dbias) @ x, dbias


def linear(x: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    """`projection(x)`, which has a bias, for `x` of two dimensions at least."""
    return linear_map(x, projection.weight, projection.bias)


def linear_map(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight, bias)` of `x` [..., M, K], under autocast in its type."""
    low = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not low or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, torch.get_autocast_dtype("cpu"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        low = x.to(dtype)
        ctx.save_for_backward(low, weight)
        ctx.type = x.dtype
        return affine(low, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = (grad @ weight.to(grad.dtype)).to(ctx.type) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None
        return dx, *(g.to(weight.dtype) for g in affine_gradients(grad, x)), None
