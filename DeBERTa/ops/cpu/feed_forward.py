"""The feed-forward network with its input as the only saved activation.

On a CPU memory traffic takes longer than the matmul that recomputes the other activations.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.linear import apply_affine, differentiate_affine, find_tile_kernel


class FeedForward(torch.autograd.Function):
    """`linear(activation(linear(x)))`, recomputed in part in the backward pass.

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
            kernel = find_tile_kernel("feed_forward", x, *zip(weights, shapes, strict=True))
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
            kernel = library.find_kernel("feed_forward_gradients", x, inner_weight)
            kernel(x.contiguous(), *weights, grad_x, *gradients, x.numel() // size, size, width)
            return grad_x.to(x_dtype), *gradients, None
        hidden = apply_affine(x, inner_weight, inner_bias)
        grad_activated = grad @ outer_weight.to(x.dtype)
        activated, grad_hidden = _differentiate_activation(ctx.activation, hidden, grad_activated)
        grad_x, *inner = differentiate_affine(grad_hidden, x, inner_weight)
        _, *outer = differentiate_affine(grad, activated, outer_weight, needs_input=False)
        return grad_x.to(x_dtype), *(gradient.to(parameter_dtype) for gradient in (*inner, *outer)), None


def _differentiate_activation(
    activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `activation(hidden)` and the gradient of `hidden`.

    Both inputs may be overwritten.
    """
    kernel = library.find_kernel("gelu_gradients", hidden) if activation is F.gelu else None
    if kernel is not None:
        kernel(hidden, grad, hidden.numel())
        return hidden, grad
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        activated = activation(hidden)
    (grad_hidden,) = torch.autograd.grad(activated, hidden, grad)
    return activated.detach(), grad_hidden
