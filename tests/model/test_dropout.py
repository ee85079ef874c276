"""Dropout's rate, scaling, gradient, and independence between elements, calls and seeds."""

import pytest
import torch

from DeBERTa.model.dropout import Dropout, keep_mask, negate_dropped

COUNT = 1 << 21


def signs(count: int) -> torch.Tensor:
    """A mask of half the elements as -1 and 1."""
    return keep_mask((count,), 0.5).float().mul_(2).sub_(1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    torch.manual_seed(0)
    mask = keep_mask((COUNT + 3,), p)
    error = (p * (1 - p) / COUNT) ** 0.5
    assert abs(mask.float().mean() - (1 - p)) < 4 * error + 2**-17  # p is rounded to 2^-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_signs_are_those_of_the_mask(dtype, p):
    """Both read the same random numbers; zeros carry their sign, too."""
    x = torch.rand(COUNT + 3).to(dtype)
    x[::3] = 0
    torch.manual_seed(0)
    mask = keep_mask(x.shape, p)
    torch.manual_seed(0)
    signed = negate_dropped(x.clone(), p)
    assert torch.equal(signed.signbit(), ~mask)
    assert torch.equal(signed.abs(), x)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 32768, 32769])
def test_elements_are_independent(lag):
    """No correlation between elements of one word, neighbouring words, or chunks."""
    torch.manual_seed(1)
    mask = signs(COUNT)
    correlation = (mask[:-lag] * mask[lag:]).mean()
    assert abs(correlation) < 4 / COUNT**0.5


def test_calls_and_seeds_differ_and_repeat():
    def masks(seed):
        torch.manual_seed(seed)
        return [signs(COUNT) for _ in range(2)]

    first, again, other = masks(5), masks(5), masks(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in ((first[0], first[1]), (first[0], other[0]), (first[1], other[0])):
        assert abs((a * b).mean()) < 4 / COUNT**0.5


@pytest.mark.parametrize("add", [False, True])
def test_value_and_gradient(add):
    """Kept elements and their gradients are scaled by 1 / (1 - p), dropped ones are zero in both."""
    torch.manual_seed(2)
    dropout = Dropout(0.25)
    x = torch.rand(40, 50).add_(1).requires_grad_()
    residual = torch.rand(40, 50).requires_grad_()
    out = dropout.add(residual, x) if add else dropout(x)
    changed = out - residual if add else out
    kept = changed.detach() > 0.5
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(changed, torch.where(kept, x / 0.75, 0.0), atol=1e-6, rtol=1e-6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.75, 0.0))
    if add:
        assert torch.equal(residual.grad, torch.ones_like(residual))


def test_evaluation_and_zero_change_nothing():
    x, residual = torch.randn(10), torch.randn(10)
    for dropout in (Dropout(0.3).eval(), Dropout(0.0).train()):
        assert torch.equal(dropout(x), x)
        assert torch.equal(dropout.add(residual, x), residual + x)
