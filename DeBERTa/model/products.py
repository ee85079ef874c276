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


def tiled(
    name: str, x: torch.Tensor, *parameters: tuple[torch.Tensor, tuple[int, ...]]
) -> Callable[..., None] | None:
    """A kernel of linear_maps.cpp for `x` and these parameters, if there is one.

    With each parameter comes the shape it has to have. What does not fit is left to PyTorch's operations, which take
    other layouts and say what is wrong with shapes.
    """
    for parameter, shape in parameters:
        if kernels.find(name, x, parameter) is None or tuple(parameter.shape) != shape:
            return None
        if not parameter.is_contiguous() or any(size % 32 or not size for size in shape):
            return None
    return kernels.find(name, x, parameters[0][0])


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x weight^T + bias` [..., N] of `x` [..., K] and `weight` [N, K], in the type of `x`."""
    columns, depth = weight.shape
    kernel = tiled("affine", x, (weight, (columns, x.size(-1))), (bias, (columns,)))
    if kernel is None:
        return torch.addmm(bias.to(x.dtype), x.flatten(0, -2), transposed(weight, x.dtype)).unflatten(
            0, x.shape[:-1]
        )
    y = x.new_empty(*x.shape[:-1], columns)
    kernel(x.contiguous(), weight, bias, y, y.numel() // columns, depth, columns)
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

    Those of the parameters are summed over all rows, in float32 at least; the weight's in `out`, if given. Where there
    is no kernel, the weight's has been rounded to the type of `grad`.
    """
    (columns, depth), shape = weight.shape, x.shape
    out = (
        weight.new_empty(columns, depth, dtype=torch.promote_types(grad.dtype, torch.float32))
        if out is None
        else out
    )
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    dbias = out.new_empty(columns) if bias else None
    kernel = tiled("affine_gradients", grad, (weight, (grad.size(-1), x.size(-1))), (out, (columns, depth)))
    if kernel is None or len(x) != len(grad):
        dx = (grad @ weight.to(grad.dtype)).view(shape) if inputs else None
        turned = transposed(grad, grad.dtype, dbias)
        return dx, torch.mm(turned, x, out=out) if out.dtype == x.dtype else out.copy_(turned @ x), dbias
    dx = x.new_empty(shape) if inputs else None
    kernel(grad.contiguous(), x.contiguous(), weight, dx, out, dbias, len(x), depth, columns)
    return dx, out, dbias


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
        if not any(ctx.needs_input_grad[1:3]):
            return (grad @ weight.to(grad.dtype)).to(ctx.type), None, None, None
        dx, *parameters = affine_gradients(grad, x, weight, inputs=ctx.needs_input_grad[0])
        dx = dx.to(ctx.type) if dx is not None else None
        return dx, *(gradient.to(weight.dtype) for gradient in parameters), None
