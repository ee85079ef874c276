"""BlockedAttention on kernels against PyTorch's operations; tests/model/test_attention.py has the formula."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.attention import BlockedAttention, view_distances
from tests.conftest import disable_kernels, set_threads

FUSED = [(32, 32), (64, 64), (96, 64), (128, 32), (160, 64), (544, 64), (64, 128)]
SIZES = [(20, 8, torch.float32), (64, 32, torch.bfloat16)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("length", "size"), [(length, 8) for length in (1, 15, 16, 17, 63, 300)] + FUSED)
@pytest.mark.parametrize("tables", ["both", "c2p", "p2c", "none"])
def test_kernels_against_torch(length, size, tables):
    """Lengths around those of tiles and blocks, with dropout."""
    mask = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
    compare_with_torch(mask, size, tables, 0.2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_kernels_against_torch_in_larger_batches(size, p):
    """More sequences than one thread adds table gradients for; masks with holes, and of padding alone."""
    mask = torch.rand(9, 64, generator=torch.Generator().manual_seed(5)) < 0.8
    mask[0], mask[7] = True, False
    compare_with_torch(mask, size, "both", p)


def compare_with_torch(mask: torch.Tensor, size: int, tables: str, p: float) -> None:
    """Compare float32 to 1e-5; the error of bfloat16 may be that of PyTorch's operations."""
    torch.manual_seed(6)
    batch, length = mask.shape
    shapes = ((batch, 3, length, size),) * 3 + ((3, 2 * length - 1, size),) * 2
    inputs = [torch.randn(shape).div(size**0.25).bfloat16() for shape in shapes]
    used = [True] * 3 + [tables in ("both", "c2p"), tables in ("both", "p2c")]
    weights = torch.randn(batch, length, 3, size).bfloat16()

    def compute(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(7)
        leaves = [x.to(dtype).requires_grad_() if use else None for x, use in zip(inputs, used, strict=True)]
        context = BlockedAttention.apply(*leaves, mask, p)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [context.detach(), *torch.autograd.grad(context, wanted, weights.to(dtype))]

    by_kernels = [compute(dtype) for dtype in (torch.float32, torch.bfloat16)]
    with disable_kernels():
        by_torch = [compute(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for ours, ours_low, theirs, theirs_low in zip(*by_kernels, *by_torch, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        error, usual = (float((low.float() - theirs).norm()) for low in (ours_low, theirs_low))
        assert error <= 1.1 * usual + 1e-6


@pytest.mark.usefixtures("kernels")
def test_fused_kernels_where_the_processor_has_tiles(monkeypatch):
    """On a processor with AMX the fused kernels are called for the sizes they are made for, and no other."""
    called, find_kernel = [], library.find_kernel

    def record(name: str, *tensors: torch.Tensor):
        called.append((name, kernel := find_kernel(name, *tensors)))
        return kernel

    monkeypatch.setattr(library, "find_kernel", record)  # what is called is recorded, and runs
    has_tiles = "amx_bf16" in Path("/proc/cpuinfo").read_text() or "tiles" in os.environ.get("CXX", "")
    sizes = [(64, 32, torch.bfloat16), (60, 32, torch.bfloat16), (64, 16, torch.bfloat16)]
    for length, size, dtype in [*sizes, (64, 32, torch.float32)]:
        called.clear()
        q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, length, dtype=torch.bool)
        BlockedAttention.apply(q, k, v, None, None, mask, 0.0).float().sum().backward()
        fused = [
            name for name, kernel in called if kernel is not None and name.startswith("compute_attention")
        ]
        is_made_for = (length, size, dtype) == (64, 32, torch.bfloat16)
        expected = ["compute_attention", "compute_attention_gradients"] if is_made_for and has_tiles else []
        assert fused == expected
        assert called


@pytest.mark.usefixtures("way")
def test_same_bits_with_any_number_of_threads():
    """One, two, and more than there are heads."""
    found = []
    for threads in (1, 2, 7):
        torch.manual_seed(9)
        inputs = [torch.randn(6, 2, 96, 64) for _ in range(3)] + [torch.randn(2, 191, 64) for _ in range(2)]
        inputs = [x.div(3).bfloat16().requires_grad_() for x in inputs]
        with set_threads(threads):
            context = BlockedAttention.apply(*inputs, torch.ones(6, 96, dtype=torch.bool), 0.1)
            found.append([context, *torch.autograd.grad(context.float().square().sum(), inputs)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("length", "size", "dtype"), SIZES)
def test_gradient_checkpointing_gives_the_same_bits(length, size, dtype):
    """It reads each saved tensor once."""
    torch.manual_seed(10)
    inputs = [torch.randn(2, 2, length, size) for _ in range(3)]
    inputs += [torch.randn(2, 2 * length - 1, size) for _ in range(2)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    mask = torch.ones(2, length, dtype=torch.bool)
    torch.manual_seed(11)
    plain = BlockedAttention.apply(*inputs, mask, 0.1)
    torch.manual_seed(11)
    again = checkpoint(BlockedAttention.apply, *inputs, mask, 0.1, use_reentrant=False)
    assert torch.equal(plain, again)
    gradients = [torch.autograd.grad(context.float().square().sum(), inputs) for context in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("length", "size", "dtype"), SIZES)
def test_not_a_number_stays_in_its_row(length, size, dtype):
    """A query that is not finite makes its row of the context so, and no other."""
    torch.manual_seed(8)
    q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype)
    tables = torch.randn(2, 2, 2 * length - 1, size, dtype=dtype)
    for value in (float("nan"), float("inf")):
        q[0, 1, 5, 3] = value
        context = BlockedAttention.apply(q, k, v, *tables, torch.ones(1, length, dtype=torch.bool), 0.0)
        assert context[0, 5, 1].isnan().all()
        assert context.isfinite().sum() == (2 * length - 1) * size


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("length", "size", "dtype"), SIZES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_padding_is_not_read(length, size, dtype, value):
    """A key that is not finite, at a padded position, changes nothing."""
    torch.manual_seed(10)
    q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype)
    tables = torch.randn(2, 2, 2 * length - 1, size, dtype=dtype)
    mask = torch.arange(length)[None] < length - 4
    expected = BlockedAttention.apply(q, k, v, *tables, mask, 0.0)
    k[0, 1, -2] = value
    assert torch.equal(BlockedAttention.apply(q, k, v, *tables, mask, 0.0), expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("length", "size", "dtype"), SIZES)
def test_gradients_that_are_not_finite_are_not_hidden(length, size, dtype):
    """A query that is not finite leaves no finite gradient of the values it attends to."""
    torch.manual_seed(11)
    for value in (float("nan"), float("inf"), -float("inf")):
        leaves = [torch.randn(1, 1, length, size, dtype=dtype) for _ in range(3)]
        leaves[0][0, 0, 5] = value
        leaves = [leaf.requires_grad_() for leaf in leaves]
        context = BlockedAttention.apply(*leaves, None, None, torch.ones(1, length, dtype=torch.bool), 0.0)
        (dv,) = torch.autograd.grad(context.float().square().sum(), leaves[2:])
        assert dv.isnan().all()


def test_gradient_against_finite_differences():
    torch.manual_seed(3)
    shapes = ((2, 2, 5, 3),) * 3 + ((2, 9, 3),) * 2
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.autograd.gradcheck(lambda *t: BlockedAttention.apply(*t, mask, 0.0), tensors)


def test_view_distances():
    scores = torch.arange(10 + 2 * 4 * 7)[10:].view(2, 4, 7)
    view = view_distances(scores, 10)
    for row in range(4):
        for column in range(4):
            assert torch.equal(view[:, row, column], scores[:, row, 3 - row + column])
