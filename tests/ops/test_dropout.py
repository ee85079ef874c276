"""Dropout's rate, scaling, gradient, and independence between elements, calls and seeds."""

import numpy as np
import pytest
import torch

from DeBERTa.ops.dropout import draw_keep_mask

pytestmark = pytest.mark.usefixtures("way")

COUNT = 1 << 21


def kept(count: int, p: float) -> torch.Tensor:
    """bool: what dropout keeps of `count` elements."""
    return Dropout(p)(torch.ones(count)) != 0


def signs(count: int) -> torch.Tensor:
    """A mask of half the elements as -1 and 1."""
    return kept(count, 0.5).float().mul_(2).sub_(1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    torch.manual_seed(0)
    error = (p * (1 - p) / COUNT) ** 0.5
    assert abs(kept(COUNT + 3, p).float().mean() - (1 - p)) < 4 * error + 2**-17  # p is rounded to 2^-16


def test_words_are_those_of_the_published_generator():
    """SplitMix64 from seed 1234567; each word decides four elements, the lowest bits the first."""
    words = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = np.array(words, dtype="<u8").view("<u2").astype(int)
    for p in (0.1, 0.5, 1 - 2**-16):
        assert draw_keep_mask((20,), 1234567, p).tolist() == (bits >= round(p * 2**16)).tolist()
        assert draw_keep_mask((9,), 1234567, p, first=6).tolist() == (bits >= round(p * 2**16)).tolist()[6:15]


@pytest.mark.parametrize("count", [1, 7, 4096, 4097, 200_003])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.9, 1 - 2**-16])
def test_either_way_the_masks_are_the_same(count, p):
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    assert torch.equal(kept(count, p), draw_keep_mask((count,), seed, p))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 4096, 65536, 65537])
def test_elements_are_independent(lag):
    """No correlation between elements of one word, neighbouring words, or blocks."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_value_and_gradient(add, dtype):
    """Kept elements and their gradients are scaled by 1 / (1 - p), dropped ones are zero in both."""
    torch.manual_seed(2)
    dropout = Dropout(0.25)
    x = torch.rand(50, 40).add_(1).to(dtype).t().requires_grad_()  # not contiguous
    residual = torch.rand(40, 50).requires_grad_()
    out = dropout.add(residual, x) if add else dropout(x)
    assert out.dtype == (torch.float32 if add else dtype)
    changed = out - residual if add else out
    kept = changed.detach() > 0.5
    assert 0.7 < kept.float().mean() < 0.8
    error = 1e-6 if dtype == torch.float32 else 2**-8  # of bfloat16
    torch.testing.assert_close(
        changed.float(), torch.where(kept, x.float() / 0.75, 0.0), atol=1e-6, rtol=error
    )
    weights = torch.rand(40, 50)
    (out * weights).sum().backward()
    torch.testing.assert_close(
        x.grad.float(), torch.where(kept, weights / 0.75, 0.0), atol=1e-6, rtol=2 * error
    )
    if add:
        assert torch.equal(residual.grad, weights)


def test_evaluation_and_zero_change_nothing():
    x, residual = torch.randn(10), torch.randn(10)
    for dropout in (Dropout(0.3).eval(), Dropout(0.0).train()):
        assert torch.equal(dropout(x), x)
        assert torch.equal(dropout.add(residual, x), residual + x)
