"""Linear maps in bfloat16 against the same in float64."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.ops.cpu.linear import apply_affine, apply_linear, differentiate_affine, transpose

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

    def results(compute, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = results(F.linear, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(apply_linear, torch.float32), results(F.linear, torch.float32)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, usual, right in zip(ours, theirs, exact, strict=True):
        error, allowed = (float((tensor.double() - right).norm()) for tensor in (mine, usual))
        assert error <= 1.1 * allowed + 1e-6
    torch.testing.assert_close(
        results(apply_linear, torch.float32), results(F.linear, torch.float32), rtol=0, atol=0
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
