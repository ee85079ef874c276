"""Operations and bytes of one micro-batch stay under limits, so that a new pass over memory is noticed."""

import pytest
import torch

pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")
pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks.traffic import CASES, META, TrafficCounter, count_micro_batch, list_kernel_traffic

# Operations, GB moved, GB saved for the backward passes: what was counted, the same with torch 2.11 and 2.13.
COUNTS = {
    ("base 32x512", "eager"): (3112, 304.4, 30.1),
    ("base 32x512", "sdpa"): (2549, 164.9, 14.2),
    ("base 32x512", "triton"): (2254, 113.5, 9.4),
    ("xsmall 64x512", "eager"): (3252, 312.0, 29.9),
    ("xsmall 64x512", "sdpa"): (2689, 171.0, 13.8),
    ("xsmall 64x512", "triton"): (2394, 120.2, 9.2),
}


@pytest.mark.parametrize(("case", "attention"), COUNTS)
def test_one_micro_batch(case, attention):
    """One more pass anywhere is noticed, and so is a saving, which belongs into benchmarks/results.md."""
    config_name, sequences = CASES[case]
    traffic, _ = count_micro_batch(config_name, sequences, attention)
    counted = (traffic.operations, round(traffic.moved / 1e9, 1), round(traffic.saved / 1e9, 1))
    assert counted == COUNTS[case, attention]


@pytest.mark.parametrize(("attention", "attended"), [("triton", 2), ("sdpa", 19)])
def test_additions_in_any_order(attention, attended):
    """Without `--deterministic`: the word table's gradient, and the mask decoder's, as the page says."""
    _, counter = count_micro_batch("rtd_base.json", 2, attention)
    atomic = ("index_add", "index_put", "scatter_add", "scatter_reduce", "put_")
    found = {name: calls for name, calls in counter.calls.items() if any(x in name for x in atomic)}
    assert found == {"index_add_": 1, "scatter_add_": 3}
    assert counter.calls["_scaled_dot_product_efficient_attention_backward"] == attended


def test_counter():
    """Views move nothing, matmuls their operands, lookups and updates their rows; fills are written only."""
    x, table = torch.empty(4, 8, device=META), torch.empty(1000, 8, device=META)
    ids = torch.empty(5, dtype=torch.int64, device=META)
    expected = {
        (lambda: x.t().reshape(2, 16).transpose(0, 1)): 4 * 64,  # `reshape` of a transposed matrix copies
        (lambda: x @ x.t()): 4 * (32 + 32 + 16),
        (lambda: x + x): 4 * 96,
        (lambda: torch.nn.functional.embedding(ids, table)): 4 * 80 + 8 * 5,
        (lambda: table.index_add_(0, ids, torch.empty(5, 8, device=META))): 4 * 120 + 8 * 5,
        (lambda: x.zero_()): 4 * 32,
        (lambda: torch.zeros_like(x)): 4 * 32,
        (lambda: x.copy_(x[:1])): 4 * 40,
        (lambda: x[:1].expand(4, 8) + 1): 4 * 40,
    }
    for compute, moved in expected.items():
        with TrafficCounter() as counter:
            compute()
        assert counter.bytes.total() == moved
        assert counter.calls.total() == 1


def test_formula_of_the_kernels():
    """At L 512 and 12 heads of 64, a layer's tables are 3 MB each, scores 201 MB, rows of [B, L, h] 25 MB."""
    forward, backward = (list_kernel_traffic((32, 512, 12, 64), is_backward=b) for b in (False, True))
    rows, scores = 2 * 32 * 512 * 768, 2 * 32 * 12 * 512 * 512
    assert 4 * rows < sum(forward.values()) < 6 * rows
    # Gradients of scores are written once and read three times.
    assert 4 * scores + 13 * rows < sum(backward.values()) < 4 * scores + 18 * rows
