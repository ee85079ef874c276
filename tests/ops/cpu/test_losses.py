"""The kernels' passes over a chunk of logits; tests/model/test_losses.py has what holds for every way."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model import losses
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.losses import CpuChunkOperations


def compute_vocabulary_loss(*inputs: torch.Tensor, chunk: int = losses.CHUNK) -> losses.MaskedLoss:
    """Return the loss with chunks of `chunk` tokens."""
    return losses.compute_vocabulary_loss(*inputs, operations=CpuChunkOperations(chunk))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("chunk", [32, 96, 1024])
@pytest.mark.parametrize(
    ("rows", "width", "tokens"), [(1, 32, 1), (31, 64, 250), (64, 96, 992), (130, 1056, 8225)]
)
def test_bfloat16_is_exact_but_for_rounding(rows, width, tokens, chunk):
    """Compare values that bfloat16 can hold with float64; logits and their gradients are rounded."""
    torch.manual_seed(2)
    x, table, bias = (
        torch.randn(rows, width).bfloat16(),
        torch.randn(tokens, width) / width**0.5,
        torch.randn(tokens),
    )
    targets, weights, uniforms = (
        torch.randint(0, tokens, (rows,)),
        torch.rand(rows) - 0.3,
        torch.rand(rows).double(),
    )
    targets[: rows // 4] = (x.float() @ table.t() + bias).argmax(1)[: rows // 4]
    leaves = [x.requires_grad_(), table.requires_grad_(), bias.requires_grad_()]
    actual = compute_vocabulary_loss(*leaves, targets, uniforms, chunk=chunk)
    ours = torch.autograd.grad((actual.loss * weights).sum(), leaves)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, table)] + [bias.detach().double()]
    logits = F.linear(exact[0], exact[1], exact[2].requires_grad_())
    expected = F.cross_entropy(logits, targets, reduction="none")
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(actual.loss.double(), expected, atol=0.05, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm() + 1e-6


def test_values_that_are_not_finite(way):
    """Their row has no finite loss, and a sample of the vocabulary; other rows do not change."""
    torch.manual_seed(4)
    x, table, bias = torch.randn(40, 32).bfloat16(), torch.randn(250, 32), torch.randn(250)
    targets, uniforms = torch.arange(40), torch.rand(40)
    usual = compute_vocabulary_loss(x, table, bias, targets, uniforms)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    out = compute_vocabulary_loss(x.requires_grad_(), table, bias, targets, uniforms)
    others = out.loss.isfinite()
    assert (~others).nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(out.loss[others], usual.loss[others])
    assert torch.equal(out.samples[others], usual.samples[others])
    assert out.samples.min() >= 0
    assert out.samples.max() < 250
    (dx,) = torch.autograd.grad(out.loss.sum(), x)
    if way == "kernels" and library.has_tiles():  # PyTorch's matmuls spread them to the next rows
        assert torch.equal(dx.isfinite().all(1), others)


@pytest.mark.usefixtures("kernels")
def test_exponentials():
    """Compare with float64: to 3 units of the last place, and 0 where float32 has none."""
    logits = torch.linspace(-100, 0, 100_001).view(1, -1)
    largest, sums = torch.empty(1), torch.empty(1, 100_001)
    library.find_kernel("sum_chunk", logits)(logits, largest, sums, 1, 100_001, 1)
    exact = logits.double().exp()
    assert largest == 0
    torch.testing.assert_close(sums.double(), torch.where(logits < -87, 0.0, exact), rtol=3 * 2**-23, atol=0)
    logits[0, 7] = float("nan")
    library.find_kernel("sum_chunk", logits)(logits, largest, sums, 1, 100_001, 1)
    assert sums[0, 7].isnan()
    assert sums.isnan().sum() == 1
