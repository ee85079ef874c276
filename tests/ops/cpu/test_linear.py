"""Linear maps and the feed-forward network: bfloat16 against float64, gradients against autograd."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model.encoder import ACTIVATION
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.linear import FeedForward, apply_affine, apply_linear, differentiate_affine, transpose

SHAPES = [(1, 1), (16, 16), (31, 47), (33, 16), (64, 96), (300, 50)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape, dtype):
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype)
    x[0, 0] = float("nan")
    out = transpose(x, torch.bfloat16)
    torch.testing.assert_close(out, x.bfloat16().t(), rtol=0, atol=0, equal_nan=True)
    # A view of part of a larger matrix.
    wide = torch.randn(shape[0], shape[1] + 3).to(dtype)
    torch.testing.assert_close(
        transpose(wide[:, 1:-2], torch.bfloat16), wide[:, 1:-2].bfloat16().t(), rtol=0, atol=0
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 24, 40), (64, 32, 96)])
def test_linear(shape):
    """Value and gradients are as near to the exact ones as those of PyTorch under autocast."""
    torch.manual_seed(2)
    rows, inputs, outputs = shape
    x, weight, bias = torch.randn(2, rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    grad = torch.randn(2, rows, outputs)

    def compute_results(compute, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = compute_results(F.linear, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compute_results(apply_linear, torch.float32), compute_results(F.linear, torch.float32)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, usual, right in zip(ours, theirs, exact, strict=True):
        error, allowed = (float((tensor.double() - right).norm()) for tensor in (mine, usual))
        assert error <= 1.1 * allowed + 1e-6
    torch.testing.assert_close(
        compute_results(apply_linear, torch.float32), compute_results(F.linear, torch.float32), rtol=0, atol=0
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_gradients(shape, dtype):
    """Sums over rows are not rounded to bfloat16 on the way."""
    torch.manual_seed(3)
    rows, columns = shape
    grad, x = torch.randn(2, rows, columns).to(dtype), torch.randn(2, rows, 16).to(dtype)
    weight = torch.randn(columns, 16, dtype=torch.promote_types(dtype, torch.float32))
    dx, dweight, dbias = differentiate_affine(grad, x, weight)
    assert dx.dtype == dtype
    assert dweight.dtype == dbias.dtype == weight.dtype
    close = {
        "rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5,
        "atol": 2**-4 if dtype == torch.bfloat16 else 1e-4,
    }
    torch.testing.assert_close(dx.double(), grad.double() @ weight.to(dtype).double(), **close)
    exact = torch.einsum("bmn,bmk->nk", grad.double(), x.double())
    torch.testing.assert_close(dweight.double(), exact, rtol=close["rtol"], atol=1e-4)
    torch.testing.assert_close(dbias.double(), grad.double().sum((0, 1)), rtol=1e-5, atol=1e-4)
    out = torch.zeros_like(weight)
    none, same, nothing = differentiate_affine(grad, x, weight, needs_input=False, needs_bias=False, out=out)
    assert (none, nothing) == (None, None)
    assert same is out
    assert torch.equal(out, dweight)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("columns", [32, 96, 288])
@pytest.mark.parametrize("depth", [32, 64, 1056])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64, 65, 200])
def test_matmuls_of_tiles(rows, depth, columns):
    """Values that bfloat16 can hold give float32 sums, rounded once; rows around x and grad are not read."""
    torch.manual_seed(4)
    x, grad = (torch.full((rows + 70, size), float("nan"), dtype=torch.bfloat16) for size in (depth, columns))
    x, grad = x[1 : rows + 1].normal_(), grad[1 : rows + 1].normal_()
    weight, bias = torch.randn(columns, depth), torch.randn(columns)
    y = apply_affine(x, weight, bias)
    dx, dweight, dbias = differentiate_affine(grad, x, weight)
    rounded = weight.bfloat16().double()
    for actual, exact, terms in (
        (y, x.double() @ rounded.t() + bias.double(), depth),
        (dx, grad.double() @ rounded, columns),
        (dweight, grad.double().t() @ x.double(), rows),
        (dbias, grad.double().sum(0), rows),
    ):
        last_place = 2.0**-8 if actual.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(actual.double(), exact, rtol=last_place, atol=1e-5 * max(terms, 1) ** 0.5)
    wide = torch.full((columns + 2, depth), float("nan"))
    none, same, nothing = differentiate_affine(
        grad, x, weight, needs_input=False, needs_bias=False, out=wide[1:-1]
    )
    assert (none, nothing) == (None, None)
    assert torch.equal(same, dweight)
    assert torch.equal(wide[1:-1], dweight)
    assert wide[[0, -1]].isnan().all()


@pytest.mark.usefixtures("way")
def test_other_layouts_and_frozen_parameters():
    torch.manual_seed(5)
    x, weight, bias = torch.randn(40, 64), torch.randn(64, 96).t(), torch.randn(1).expand(96)
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_linear(x, weight, bias)
        turned = apply_linear(x.t().contiguous().t(), weight.contiguous(), bias.bfloat16())
        frozen = apply_linear(x.requires_grad_(), weight, bias)
    torch.testing.assert_close(turned, y, rtol=0.02, atol=0.1)
    (dx,) = torch.autograd.grad(frozen.float().sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(40, 64), rtol=0.02, atol=0.1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("size", "biases"), [(96, 32), (32, 96), (64, 32)])
def test_shapes_that_do_not_match_are_refused(size, biases):
    x, weight = torch.zeros(8, size), torch.zeros(96, 64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        apply_linear(x, weight, torch.zeros(biases))


@pytest.mark.usefixtures("tiles")
def test_values_that_are_not_finite_stay_in_their_row():
    x, weight = torch.ones(64, 32, dtype=torch.bfloat16), torch.ones(64, 32)
    x[3, 5], x[40, 0] = float("nan"), float("inf")
    y = apply_affine(x, weight, torch.zeros(64))
    assert y[3].isnan().all()
    assert y[40].isposinf().all()
    assert y.isfinite().all(1).sum() == 62
    _, dweight, dbias = differentiate_affine(torch.ones(64, 64, dtype=torch.bfloat16), x, weight)
    assert dweight[:, 5].isnan().all()
    assert dweight[:, 0].isposinf().all()
    assert dweight.isfinite().all(0).sum() == 30
    assert dbias.eq(64).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "size", "inner"),
    [*((name, 7, 16, 40) for name in ACTIVATION), ("gelu", 30, 64, 288), ("gelu", 32, 32, 64)],
)
def test_value_and_gradients_of_the_feed_forward_network(name, rows, size, inner, low):
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
    library.find_kernel("compute_gelu_gradients", x)(actual, derivative, x.numel())
    assert (actual - value).abs().max() < 1e-6
    assert (derivative - slope).abs().max() < 1e-6


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 31, 32, 70, 129])
def test_feed_forward_in_bfloat16_is_as_exact_as_its_rounding(rows):
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
def test_shapes_that_do_not_match_are_refused_by_the_feed_forward_network():
    x, w, b, v, c = (torch.zeros(shape) for shape in ((8, 64), (96, 64), (96,), (64, 96), (64,)))
    wrong = [(x[:, :32], w, b, v, c), (x, w, b[:32], v, c), (x, w, b, torch.zeros(128, 96), torch.zeros(64))]
    for inputs in wrong:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            FeedForward.apply(*inputs, F.gelu)
