"""Loss, samples and gradients in chunks against one softmax over the full vocabulary."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model import losses
from DeBERTa.model.losses import CHUNK, ChunkOperations, MaskedLoss
from tests.conftest import disable_kernels, require_kernels

ROWS, WIDTH, TOKENS = 37, 16, 250


def compute_in_chunks(
    operations: type[ChunkOperations], *inputs: torch.Tensor | None, chunk: int = CHUNK
) -> MaskedLoss:
    """Return the loss with chunks of `chunk` tokens."""
    x, table, bias, targets, uniforms = (*inputs, None)[:5]
    return losses.compute_vocabulary_loss(x, table, bias, targets, uniforms, operations(chunk))


@pytest.fixture(params=["plain", "kernels", "torch"])
def compute_loss(request) -> Iterator[Callable[..., MaskedLoss]]:
    """Return the function with each way to compute a chunk: plain, DeBERTa/ops with and without kernels."""
    if request.param == "plain":
        yield functools.partial(compute_in_chunks, ChunkOperations)
        return
    if request.param == "kernels":
        require_kernels()
    with disable_kernels() if request.param == "torch" else contextlib.nullcontext():
        from DeBERTa.ops.cpu.losses import CpuChunkOperations

        yield functools.partial(compute_in_chunks, CpuChunkOperations)


@pytest.fixture
def head() -> list[torch.Tensor]:
    """Return inputs, table and bias."""
    torch.manual_seed(0)
    x, table, bias = torch.randn(ROWS, WIDTH), torch.randn(TOKENS, WIDTH), torch.randn(TOKENS)
    return [t.requires_grad_() for t in (x, table, bias)]


@pytest.mark.parametrize("chunk", [32, 64, 256, 1024])
def test_loss_and_gradients(head, chunk, compute_loss):
    targets = torch.randint(0, TOKENS, (ROWS,))
    weights = torch.rand(ROWS) - 0.3  # the gradient need not be the same for every row, nor of one sign
    weights[3] = 0
    logits = F.linear(*head)
    expected = F.cross_entropy(logits, targets, reduction="none")
    actual = compute_loss(*head, targets, chunk=chunk)
    torch.testing.assert_close(actual.loss, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual.correct, logits.argmax(1) == targets)
    assert actual.samples is None
    ours = torch.autograd.grad((actual.loss * weights).sum(), head)
    theirs = torch.autograd.grad((expected * weights).sum(), head)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow(head, compute_loss):
    x, table, bias = (t.detach() for t in head)
    targets = torch.randint(0, TOKENS, (ROWS,))
    expected = F.cross_entropy(F.linear(x * 100, table, bias), targets, reduction="none")
    actual = compute_loss(x * 100, table, bias, targets, torch.rand(ROWS), chunk=64)
    torch.testing.assert_close(actual.loss, expected)
    assert (actual.samples >= 0).all()
    assert (actual.samples < TOKENS).all()


@pytest.mark.parametrize("chunk", [32, 64, 1024])
def test_samples_follow_the_distribution(chunk, compute_loss):
    """Chi-square of 200,000 samples against the exact softmax."""
    torch.manual_seed(1)
    count, tokens = 200_000, 100
    x, table, bias = torch.randn(1, WIDTH), torch.randn(tokens, WIDTH) * 0.5, torch.randn(tokens)
    expected = torch.softmax(F.linear(x, table, bias)[0].double(), -1) * count
    targets = torch.zeros(count, dtype=torch.long)
    samples = compute_loss(x.expand(count, -1), table, bias, targets, torch.rand(count), chunk=chunk).samples
    observed = torch.bincount(samples, minlength=tokens)
    usual = expected >= 5
    statistic = ((observed - expected) ** 2 / expected)[usual].sum()
    assert statistic < 148.2  # 0.1 % of true samples exceed this with 99 degrees of freedom


def test_samples_are_the_inverse_of_the_cumulative_distribution(head, compute_loss):
    """A number picks the token that one pass over the vocabulary picks, by chunk and by group."""
    x, table, bias = (t.detach() for t in head)
    targets, uniforms = torch.zeros(ROWS, dtype=torch.long), torch.rand(ROWS, dtype=torch.float64)
    probabilities = torch.softmax(F.linear(x, table, bias).double(), -1)
    for chunk in (32, 64, 256):
        tokens = torch.searchsorted(probabilities.cumsum(1), uniforms[:, None], right=True).squeeze(1)
        assert torch.equal(compute_loss(x, table, bias, targets, uniforms, chunk=chunk).samples, tokens)


def test_bfloat16_is_near_float32(head, compute_loss):
    """Logits are rounded to 8 bits: losses of about 10 agree to some hundredths, gradients to a few %."""
    targets = torch.randint(0, TOKENS, (ROWS,))
    x, table, bias = head
    full = compute_loss(x, table, bias, targets)
    low = compute_loss(x.bfloat16(), table, bias, targets)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, full.loss, atol=0.1, rtol=0.01)
    ours, theirs = (torch.autograd.grad(out.loss.mean(), table)[0] for out in (low, full))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_no_rows(head, compute_loss):
    x, table, bias = head
    out = compute_loss(x[:0], table, bias, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert out.loss.shape == (0,)
    assert out.samples.shape == (0,)
    assert torch.count_nonzero(torch.autograd.grad(out.loss.sum(), table)[0]) == 0


@pytest.mark.parametrize("wrong", ["table", "bias", "targets"])
def test_shapes_that_do_not_match_are_refused(wrong, compute_loss):
    x, table, bias, targets = (
        torch.randn(64, 64).bfloat16(),
        torch.randn(250, 64),
        torch.randn(250),
        torch.arange(64),
    )
    table = table[:, :32].contiguous() if wrong == "table" else table
    bias = bias[:100] if wrong == "bias" else bias
    targets = targets[:10] if wrong == "targets" else targets
    with pytest.raises((RuntimeError, IndexError)):
        compute_loss(x, table, bias, targets)


def test_states_by_columns(compute_loss):
    x, table, bias, targets = (
        torch.randn(64, 64).bfloat16(),
        torch.randn(250, 64),
        torch.randn(250),
        torch.arange(64),
    )
    turned = compute_loss(x.t().contiguous().t(), table, bias, targets).loss
    assert torch.equal(turned, compute_loss(x, table, bias, targets).loss)
