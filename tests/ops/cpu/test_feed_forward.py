"""The feed-forward network that saves its input only, against autograd: value and all gradients."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model.encoder import ACTIVATION
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.feed_forward import FeedForward


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "size", "inner"),
    [*((name, 7, 16, 40) for name in ACTIVATION), ("gelu", 30, 64, 288), ("gelu", 32, 32, 64)],
)
def test_value_and_gradients(name, rows, size, inner, low):
    """Compare to 1e-5; under autocast to the rounding of bfloat16, with gradients in float32."""
    torch.manual_seed(0)
    shapes = ((3, rows, size), (inner, size), (inner,), (size, inner), (size,))
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    x, w, b, v, c = inputs
    weights = torch.randn(3, rows, size)
    expected = F.linear(ACTIVATION[name](F.linear(x, w, b)), v, c)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        actual = FeedForward.apply(x, w, b, v, c, ACTIVATION[name])
    assert actual.dtype == (torch.bfloat16 if low else torch.float32)
    (first, again, theirs) = (
        torch.autograd.grad((out.float() * weights).sum(), inputs, retain_graph=True)
        for out in (actual, actual, expected)
    )
    error = 0.02 if low else 1e-5
    actual, expected = actual.detach(), expected.detach()
    for ours, twice, exact in zip((actual, *first), (actual, *again), (expected, *theirs), strict=True):
        assert torch.equal(ours, twice)
        assert float((ours - exact).norm()) < error * float(exact.norm())


@pytest.mark.usefixtures("kernels")
def test_gelu_against_its_definition():
    """Compare with x times the normal distribution function and its derivative in float64, to 1e-6."""
    x = torch.linspace(-12, 12, 100_001)
    exact = x.double().requires_grad_()
    value = exact * torch.special.ndtr(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    actual, derivative = x.clone(), torch.ones_like(x)
    library.find_kernel("gelu_gradients", x)(actual, derivative, x.numel())
    assert (actual - value).abs().max() < 1e-6
    assert (derivative - slope).abs().max() < 1e-6


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 31, 32, 70, 129])
def test_bfloat16_is_as_exact_as_its_rounding(rows):
    """Compare each value and gradient with float64 from the same inputs, to 2 % of the largest."""
    torch.manual_seed(1)
    shapes = ((rows, 64), (96, 64), (96,), (64, 96), (64,))
    x, w, b, v, c = (
        torch.randn(shape).div(shape[-1] ** 0.5).bfloat16().float().requires_grad_() for shape in shapes
    )
    weights = torch.randn(rows, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = FeedForward.apply(x, w, b, v, c, F.gelu)
    ours = [y, *torch.autograd.grad(y, (x, w, b, v, c), weights)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w, b, v, c)]
    right = F.linear(F.gelu(F.linear(*exact[:3])), *exact[3:])
    theirs = [right, *torch.autograd.grad(right, exact, weights.double())]
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual.double() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.usefixtures("way")
def test_shapes_that_do_not_match_are_refused():
    x, w, b, v, c = (torch.zeros(shape) for shape in ((8, 64), (96, 64), (96,), (64, 96), (64,)))
    wrong = [(x[:, :32], w, b, v, c), (x, w, b[:32], v, c), (x, w, b, torch.zeros(128, 96), torch.zeros(64))]
    for inputs in wrong:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            FeedForward.apply(*inputs, F.gelu)
