"""Loss, samples and gradients in chunks against the plain softmax over the whole vocabulary."""

import pytest
import torch
from torch.nn import functional as F

from DeBERTa.model.losses import vocabulary_loss
from DeBERTa.ops.cpu import library

pytestmark = pytest.mark.usefixtures("way")

ROWS, WIDTH, WORDS = 37, 16, 250


@pytest.fixture
def head():
    torch.manual_seed(0)
    x, table, bias = torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH), torch.randn(WORDS)
    return [t.requires_grad_() for t in (x, table, bias)]


@pytest.mark.parametrize("chunk", [32, 64, 256, 1024])
def test_loss_and_gradients(head, chunk):
    targets = torch.randint(0, WORDS, (ROWS,))
    weights = torch.rand(ROWS) - 0.3  # the gradient need not be the same for every row, nor of one sign
    weights[3] = 0
    logits = F.linear(*head)
    expected = F.cross_entropy(logits, targets, reduction="none")
    actual = vocabulary_loss(*head, targets, chunk=chunk)
    torch.testing.assert_close(actual.loss, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual.correct, logits.argmax(1) == targets)
    assert actual.samples is None
    ours = torch.autograd.grad((actual.loss * weights).sum(), head)
    theirs = torch.autograd.grad((expected * weights).sum(), head)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow(head):
    x, table, bias = (t.detach() for t in head)
    targets = torch.randint(0, WORDS, (ROWS,))
    expected = F.cross_entropy(F.linear(x * 100, table, bias), targets, reduction="none")
    actual = vocabulary_loss(x * 100, table, bias, targets, torch.rand(ROWS), chunk=64)
    torch.testing.assert_close(actual.loss, expected)
    assert (actual.samples >= 0).all() and (actual.samples < WORDS).all()


@pytest.mark.parametrize("chunk", [32, 64, 1024])
def test_samples_follow_the_distribution(chunk):
    """Chi-square of 200,000 samples against the exact softmax."""
    torch.manual_seed(1)
    count, words = 200_000, 100
    x, table, bias = torch.randn(1, WIDTH), torch.randn(words, WIDTH) * 0.5, torch.randn(words)
    expected = torch.softmax(F.linear(x, table, bias)[0].double(), -1) * count
    targets = torch.zeros(count, dtype=torch.long)
    samples = vocabulary_loss(x.expand(count, -1), table, bias, targets, torch.rand(count), chunk).samples
    observed = torch.bincount(samples, minlength=words)
    usual = expected >= 5
    statistic = ((observed - expected) ** 2 / expected)[usual].sum()
    assert statistic < 148.2  # 0.1 % of true samples exceed this with 99 degrees of freedom


def test_samples_are_the_inverse_of_the_cumulative_distribution(head):
    """The numbers pick the words that one pass over all of them picks, chunk by chunk and group by group."""
    x, table, bias = (t.detach() for t in head)
    targets, uniforms = torch.zeros(ROWS, dtype=torch.long), torch.rand(ROWS, dtype=torch.float64)
    probabilities = torch.softmax(F.linear(x, table, bias).double(), -1)
    for chunk in (32, 64, 256):
        words = torch.searchsorted(probabilities.cumsum(1), uniforms[:, None], right=True).squeeze(1)
        assert torch.equal(vocabulary_loss(x, table, bias, targets, uniforms, chunk).samples, words)


def test_bfloat16_is_near_float32(head):
    """Logits are rounded to 8 bits, so that losses of about 10 agree to some hundredths and gradients to a few %."""
    targets = torch.randint(0, WORDS, (ROWS,))
    x, table, bias = head
    full = vocabulary_loss(x, table, bias, targets)
    low = vocabulary_loss(x.bfloat16(), table, bias, targets)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, full.loss, atol=0.1, rtol=0.01)
    ours, theirs = (torch.autograd.grad(out.loss.mean(), table)[0] for out in (low, full))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_no_rows(head):
    x, table, bias = head
    out = vocabulary_loss(x[:0], table, bias, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert out.loss.shape == (0,) and out.samples.shape == (0,)
    assert torch.count_nonzero(torch.autograd.grad(out.loss.sum(), table)[0]) == 0


@pytest.mark.parametrize("chunk", [32, 96, 1024])
@pytest.mark.parametrize(
    ("rows", "width", "words"), [(1, 32, 1), (31, 64, 250), (64, 96, 992), (130, 1056, 8225)]
)
def test_bfloat16_is_exact_but_for_rounding(rows, width, words, chunk, way):
    """Of numbers rounded to bfloat16, against float64. With tiles, logits are in float32, and only their gradients are
    rounded; else, logits are, too."""
    torch.manual_seed(2)
    x, table, bias = (
        torch.randn(rows, width).bfloat16(),
        torch.randn(words, width) / width**0.5,
        torch.randn(words),
    )
    targets, weights, uniforms = (
        torch.randint(0, words, (rows,)),
        torch.rand(rows) - 0.3,
        torch.rand(rows).double(),
    )
    targets[: rows // 4] = (x.float() @ table.t() + bias).argmax(1)[: rows // 4]
    leaves = [x.requires_grad_(), table.requires_grad_(), bias.requires_grad_()]
    actual = vocabulary_loss(*leaves, targets, uniforms, chunk)
    ours = torch.autograd.grad((actual.loss * weights).sum(), leaves)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, table)] + [bias.detach().double()]
    logits = F.linear(exact[0], exact[1], exact[2].requires_grad_())
    expected = F.cross_entropy(logits, targets, reduction="none")
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    tiled = way == "kernels" and library.has_tiles()
    torch.testing.assert_close(actual.loss.double(), expected, atol=1e-5 if tiled else 0.05, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= (0.004 if tiled else 0.02) * b.norm() + 1e-6
    if not tiled:
        return
    assert torch.equal(actual.correct, logits.argmax(1) == targets)
    ends = torch.softmax(logits, 1).cumsum(1)
    start, end = (F.pad(ends, (1, 0)).gather(1, actual.samples[:, None] + n).squeeze(1) for n in (0, 1))
    assert (uniforms >= start - 1e-5).all() and (uniforms <= end + 1e-5).all()


def test_infinite_and_missing_numbers(way):
    """A row that has one says so, and has samples of the vocabulary; the others do not notice."""
    torch.manual_seed(4)
    x, table, bias = torch.randn(40, 32).bfloat16(), torch.randn(250, 32), torch.randn(250)
    targets, uniforms = torch.arange(40), torch.rand(40)
    usual = vocabulary_loss(x, table, bias, targets, uniforms)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    out = vocabulary_loss(x.requires_grad_(), table, bias, targets, uniforms)
    others = out.loss.isfinite()
    assert (~others).nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(out.loss[others], usual.loss[others])
    assert torch.equal(out.samples[others], usual.samples[others])
    assert out.samples.min() >= 0 and out.samples.max() < 250
    (dx,) = torch.autograd.grad(out.loss.sum(), x)
    if way == "kernels" and library.has_tiles():  # PyTorch's products in bfloat16 pass them on to the rows beside
        assert torch.equal(dx.isfinite().all(1), others)


@pytest.mark.parametrize("wrong", ["table", "bias", "targets"])
def test_shapes_that_do_not_match_are_refused(wrong):
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
        vocabulary_loss(x, table, bias, targets)


def test_states_by_columns():
    x, table, bias, targets = (
        torch.randn(64, 64).bfloat16(),
        torch.randn(250, 64),
        torch.randn(250),
        torch.arange(64),
    )
    turned = vocabulary_loss(x.t().contiguous().t(), table, bias, targets).loss
    assert torch.equal(turned, vocabulary_loss(x, table, bias, targets).loss)
