"""Linear maps in bfloat16 against the same in float64."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model.products import affine_gradients, linear_map, transposed

SHAPES = [(1, 1), (16, 16), (31, 47), (33, 16), (64, 96), (300, 50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed(shape, dtype, way):
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype)
    x[0, 0] = float("nan")
    out = transposed(x, torch.bfloat16)
    torch.testing.assert_close(out, x.bfloat16().t(), rtol=0, atol=0, equal_nan=True)
    # A view of part of a larger matrix.
    wide = torch.randn(shape[0], shape[1] + 3).to(dtype)
    torch.testing.assert_close(transposed(wide[:, 1:-2], torch.bfloat16), wide[:, 1:-2].bfloat16().t(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 24, 40), (64, 32, 96)])
def test_linear_map(shape, way):
    """Value and gradients are no further from the exact ones than those of PyTorch under autocast."""
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
        ours, theirs = results(linear_map, torch.float32), results(F.linear, torch.float32)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, usual, right in zip(ours, theirs, exact, strict=True):
        error, allowed = (float((tensor.double() - right).norm()) for tensor in (mine, usual))
        assert error <= 1.1 * allowed + 1e-6
    torch.testing.assert_close(results(linear_map, torch.float32), results(F.linear, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_gradients(shape, dtype, way):
    """Sums over rows are not rounded to bfloat16 on the way."""
    torch.manual_seed(3)
    rows, columns = shape
    grad, x = torch.randn(2, rows, columns).to(dtype), torch.randn(2, rows, 16).to(dtype)
    dweight, dbias = affine_gradients(grad, x)
    assert dweight.dtype == dtype and dbias.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.einsum("bmn,bmk->nk", grad.double(), x.double())
    torch.testing.assert_close(dweight.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    torch.testing.assert_close(dbias.double(), grad.double().sum((0, 1)), rtol=1e-5, atol=1e-4)
