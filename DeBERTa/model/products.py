"""Linear maps and their gradients, in bfloat16 on a CPU by products that are laid out for it.

On processors with AMX a kernel of linear_maps.cpp rounds and packs a weight, multiplies, and does what follows in the
cache. On others a product whose factors are both stored row by row takes about two thirds of the time that one takes
which has to turn a factor around; a kernel of kernels.cpp does that first, in less time than is saved. Elsewhere these
are the products of `F.linear`.
"""

from collections.abc import Callable

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


def tiled(name: str, x: torch.Tensor, weight: torch.Tensor) -> Callable[..., None] | None:
    """A kernel of linear_maps.cpp for `x` and `weight` [N, K], if there is one."""
    return None if any(size % 32 for size in weight.shape) else kernels.find(name, x, weight)


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x weight^T + bias` [..., N] of `x` [..., K] and `weight` [N, K], in the type of `x`."""
    kernel = tiled("affine", x, weight)
    if kernel is None:
        return torch.addmm(bias.to(x.dtype), x.flatten(0, -2), transposed(weight, x.dtype)).unflatten(0, x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], len(weight))
    kernel(x.contiguous(), weight, bias, y, y.numel() // len(weight), x.size(-1), len(weight))
    return y


def affine_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inputs: bool = True,
    bias: bool = True,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of `x` [..., K], if `inputs`, of `weight` [N, K] and, if `bias`, of that [N], from `grad` [..., N] of
    `affine`.

    Those of the parameters are summed over all rows, in float32 at least; the weight's in `out`, if given.
    """
    (columns, depth), shape = weight.shape, x.shape
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dbias = grad.new_empty(columns, dtype=dtype) if bias else None
    kernel = tiled("affine_gradients", grad, weight)
    if kernel is None:
        dx = (grad @ weight.to(grad.dtype)).view(shape) if inputs else None
        product = transposed(grad, grad.dtype, dbias) @ x
        return dx, product.to(dtype) if out is None else out.copy_(product), dbias
    dx = x.new_empty(shape) if inputs else None
    dweight = grad.new_empty(columns, depth, dtype=dtype) if out is None else out
    kernel(grad.contiguous(), x.contiguous(), weight, dx, dweight, dbias, len(x), depth, columns)
    return dx, dweight, dbias


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
        dx, *parameters = affine_gradients(grad, x, weight, inputs=ctx.needs_input_grad[0])
        dx = dx.to(ctx.type) if dx is not None else None
        return dx, *(gradient.to(weight.dtype) for gradient in parameters), None
