"""Dropout's rate, scaling, gradient, and independence between elements, calls and seeds."""

import pytest
import torch
from torch import nn

from DeBERTa import ModelConfig
from DeBERTa.model.encoder import AddNorm
from DeBERTa.ops.cpu.dropout import add_dropout
from DeBERTa.ops.cpu.modules import CpuAddNorm, CpuDropout
from DeBERTa.ops.dropout import draw_keep_mask, draw_seed
from tests.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("way")

COUNT = 1 << 21


def draw_mask(count: int, p: float) -> torch.Tensor:
    """Return bool, true where dropout does not drop one of `count` elements."""
    return CpuDropout(p)(torch.ones(count)) != 0


def draw_signs(count: int) -> torch.Tensor:
    """Return a mask of half the elements as -1 and 1."""
    return draw_mask(count, 0.5).float().mul_(2).sub_(1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    torch.manual_seed(0)
    error = (p * (1 - p) / COUNT) ** 0.5
    # Four standard errors, and p is rounded to 2^-16.
    assert abs(draw_mask(COUNT + 3, p).float().mean() - (1 - p)) < 4 * error + 2**-17


@pytest.mark.parametrize("count", [1, 7, 4096, 4097, 200_003])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.9, 1 - 2**-16])
def test_masks_are_those_of_the_reference(count, p):
    torch.manual_seed(3)
    seed = draw_seed()
    torch.manual_seed(3)
    assert torch.equal(draw_mask(count, p), draw_keep_mask((count,), seed, p))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 4096, 65536, 65537])
def test_elements_are_independent(lag):
    """No correlation between elements of one word, neighboring words, or blocks, to 4 standard errors."""
    torch.manual_seed(1)
    mask = draw_signs(COUNT)
    correlation = (mask[:-lag] * mask[lag:]).mean()
    assert abs(correlation) < 4 / COUNT**0.5


def test_calls_and_seeds_differ_and_repeat():
    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [draw_signs(COUNT) for _ in range(2)]

    first, again, other = draw(5), draw(5), draw(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in ((first[0], first[1]), (first[0], other[0]), (first[1], other[0])):
        assert abs((a * b).mean()) < 4 / COUNT**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_residual", [False, True])
def test_value_and_gradient(has_residual, dtype):
    """Remaining elements and their gradients are scaled by 1 / (1 - p), dropped ones are zero in both."""
    torch.manual_seed(2)
    x = torch.rand(50, 40).add_(1).to(dtype).t().requires_grad_()  # not contiguous
    residual = torch.rand(40, 50).requires_grad_()
    out = add_dropout(residual if has_residual else None, x, 0.25)
    assert out.dtype == (torch.float32 if has_residual else dtype)
    changed = out - residual if has_residual else out
    mask = changed.detach() > 0.5
    assert 0.7 < mask.float().mean() < 0.8
    error = 1e-6 if dtype == torch.float32 else 2**-8  # of bfloat16
    torch.testing.assert_close(
        changed.float(), torch.where(mask, x.float() / 0.75, 0.0), atol=1e-6, rtol=error
    )
    weights = torch.rand(40, 50)
    (out * weights).sum().backward()
    torch.testing.assert_close(
        x.grad.float(), torch.where(mask, weights / 0.75, 0.0), atol=1e-6, rtol=2 * error
    )
    if has_residual:
        assert torch.equal(residual.grad, weights)


def make_add_norm(p: float) -> CpuAddNorm:
    module = AddNorm(ModelConfig.from_dict(tiny_model() | {"hidden_dropout_prob": p}), 32)
    module.__class__ = CpuAddNorm
    return module


def test_evaluation_and_zero_change_nothing():
    x, residual = torch.randn(10, 32), torch.randn(10, 32)
    for dropout in (CpuDropout(0.3).eval(), CpuDropout(0.0).train()):
        assert torch.equal(dropout(x), x)
    for module in (make_add_norm(0.3).eval(), make_add_norm(0.0).train()):
        assert torch.equal(module.add(x, residual), module.LayerNorm(residual + x))


def test_residual_is_added_in_training():
    torch.manual_seed(4)
    module, plain = make_add_norm(0.3).train(), nn.LayerNorm(32, 1e-7)
    x, residual = torch.randn(10, 32), torch.randn(10, 32)
    torch.manual_seed(4)
    out = module.add(x, residual)
    torch.manual_seed(4)
    keep = draw_keep_mask((10, 32), draw_seed(), 0.3)
    torch.testing.assert_close(out, plain(residual + x * keep / 0.7), atol=1e-5, rtol=1e-5)
