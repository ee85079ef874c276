"""Linear maps and the feed-forward network on a CPU.

Their layouts are fast for bfloat16.
On processors with AMX a kernel of csrc/linear.cpp rounds and packs a weight, multiplies, and applies the
epilogue in the cache. On others a matmul whose operands are both row-major takes about two thirds of the time
of one that has to transpose an operand; a kernel of csrc/elementwise.cpp transposes first, in less time than
that saves. In other dtypes these are the matmuls of `F.linear`.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from DeBERTa.ops.cpu import library


def transpose(x: torch.Tensor, dtype: torch.dtype, sums: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x` [N, K] as [K, N] in `dtype`.

    It is copied only where contiguous rows make matmuls faster. `sums` float32 [K] receives the sums over N.
    """
    kernel = library.find_kernel("transpose_matrix", x) if dtype == torch.bfloat16 else None
    if kernel is None:
        if sums is not None:
            torch.sum(x, 0, dtype=sums.dtype, out=sums)
        return x.to(dtype).t()
    out = x.new_empty(x.size(1), x.size(0), dtype=dtype)
    kernel(x.contiguous(), out, sums, *x.shape)
    return out


def find_tile_kernel(
    name: str, x: torch.Tensor, *parameters: tuple[torch.Tensor, tuple[int, ...]]
) -> Callable[..., None] | None:
    """Return the kernel of csrc/linear.cpp for `x` and these parameters, or None.

    Each parameter comes with the shape it must have. Otherwise PyTorch computes the result: it supports
    other layouts and raises for wrong shapes.
    """
    for parameter, shape in parameters:
        if library.find_kernel(name, x, parameter) is None or tuple(parameter.shape) != shape:
            return None
        if not parameter.is_contiguous() or any(size % 32 or not size for size in shape):
            return None
    return library.find_kernel(name, x, parameters[0][0])


def apply_affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `x weight^T + bias` [..., N], in the dtype of `x` [..., K].

    weight: [N, K]. bias: [N].
    """
    columns, depth = weight.shape
    kernel = find_tile_kernel("apply_affine", x, (weight, (columns, x.size(-1))), (bias, (columns,)))
    if kernel is None:
        flat = torch.addmm(bias.to(x.dtype), x.flatten(0, -2), transpose(weight, x.dtype))
        return flat.unflatten(0, x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], columns)
    kernel(x.contiguous(), weight, bias, y, y.numel() // columns, depth, columns)
    return y


def differentiate_affine(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs_input: bool = True,
    needs_bias: bool = True,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of `x`, `weight` and bias, given that of `apply_affine`.

    grad: [..., N]. Gradients of the parameters are summed over all rows, in float32 at least. The gradient of
    the weight is written to `out`, if given. Where there is no kernel, it is rounded to the dtype of `grad`.
    """
    (columns, depth), shape = weight.shape, x.shape
    if out is None:
        out = weight.new_empty(columns, depth, dtype=torch.promote_types(grad.dtype, torch.float32))
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    grad_bias = out.new_empty(columns) if needs_bias else None
    shapes = (weight, (grad.size(-1), x.size(-1))), (out, (columns, depth))
    kernel = find_tile_kernel("compute_affine_gradients", grad, *shapes)
    if kernel is None or len(x) != len(grad):
        grad_x = (grad @ weight.to(grad.dtype)).view(shape) if needs_input else None
        transposed = transpose(grad, grad.dtype, grad_bias)
        if out.dtype == x.dtype:
            torch.mm(transposed, x, out=out)
        else:
            out.copy_(transposed @ x)
        return grad_x, out, grad_bias
    grad_x = x.new_empty(shape) if needs_input else None
    kernel(grad.contiguous(), x.contiguous(), weight, grad_x, out, grad_bias, len(x), depth, columns)
    return grad_x, out, grad_bias


def apply_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `F.linear(x, weight, bias)`, under autocast in the autocast dtype."""
    if not torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, torch.get_autocast_dtype("cpu"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        rounded = x.to(dtype)
        ctx.save_for_backward(rounded, weight)
        ctx.dtype = x.dtype
        return apply_affine(rounded, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, *parameters = differentiate_affine(grad, x, weight, needs_input=ctx.needs_input_grad[0])
        return *_cast(ctx.dtype, grad_x), *_cast(weight.dtype, *parameters), None


class FeedForward(torch.autograd.Function):
    """`linear(activation(linear(x)))`, recomputed in part in the backward pass.

    Its input is the only saved activation: on a CPU memory traffic takes longer than the matmul that
    recomputes the others.

    x: [..., h]. inner_weight [I, h], inner_bias [I], outer_weight [h, I], outer_bias [h].
    I is the intermediate size.
    """

    @staticmethod
    def forward(ctx, x, inner_weight, inner_bias, outer_weight, outer_bias, activation):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        ctx.activation, ctx.dtypes = activation, (x.dtype, inner_weight.dtype)
        x = x.to(dtype)
        ctx.save_for_backward(x, inner_weight, inner_bias, outer_weight)
        kernel = None
        if activation is F.gelu:
            size, width = x.size(-1), len(inner_weight)
            shapes = (width, size), (width,), (size, width), (size,)
            weights = (inner_weight, inner_bias, outer_weight, outer_bias)
            kernel = find_tile_kernel("apply_feed_forward", x, *zip(weights, shapes, strict=True))
        ctx.is_tiled = kernel is not None
        if kernel is None:
            return apply_affine(
                activation(apply_affine(x, inner_weight, inner_bias)), outer_weight, outer_bias
            )
        y = x.new_empty(x.shape)
        kernel(x.contiguous(), *weights, y, x.numel() // size, size, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner_weight, inner_bias, outer_weight = ctx.saved_tensors
        x_dtype, parameter_dtype = ctx.dtypes
        grad = grad.to(x.dtype)
        if ctx.is_tiled:
            (width, size), grad_x = inner_weight.shape, x.new_empty(x.shape)
            gradients = [torch.empty_like(inner_weight), torch.empty_like(inner_bias)]
            gradients += [torch.empty_like(outer_weight), inner_bias.new_empty(size)]
            weights = inner_weight, inner_bias, grad.contiguous(), outer_weight
            kernel = library.find_kernel("compute_feed_forward_gradients", x, inner_weight)
            assert kernel is not None  # as in the forward pass
            kernel(x.contiguous(), *weights, grad_x, *gradients, x.numel() // size, size, width)
            return grad_x.to(x_dtype), *gradients, None
        hidden = apply_affine(x, inner_weight, inner_bias)
        grad_activated = grad @ outer_weight.to(x.dtype)
        activated, grad_hidden = _differentiate_activation(ctx.activation, hidden, grad_activated)
        grad_x, *inner = differentiate_affine(grad_hidden, x, inner_weight)
        _, *outer = differentiate_affine(grad, activated, outer_weight, needs_input=False)
        return *_cast(x_dtype, grad_x), *_cast(parameter_dtype, *inner, *outer), None


def _cast(dtype: torch.dtype, *gradients: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if gradient is None else gradient.to(dtype) for gradient in gradients]


def _differentiate_activation(
    activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `activation(hidden)` and the gradient of `hidden`.

    Both inputs may be overwritten.
    """
    kernel = library.find_kernel("compute_gelu_gradients", hidden) if activation is F.gelu else None
    if kernel is not None:
        kernel(hidden, grad, hidden.numel())
        return hidden, grad
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        activated = activation(hidden)
    (grad_hidden,) = torch.autograd.grad(activated, hidden, grad)
    return activated.detach(), grad_hidden
