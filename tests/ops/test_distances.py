"""Scores by distance: the strided view, its inverse, and tables with a row per distance."""

import torch

from DeBERTa.ops.distances import expand_table, spread_distances, view_distances


def test_spread_is_the_inverse_of_the_view():
    """Values of three rows of four land at their distances; all other elements are zero."""
    values = torch.arange(1.0, 25).view(2, 3, 4)
    spread = spread_distances(values)
    assert spread.shape == (2, 3, 7)
    assert torch.equal(view_distances(spread[..., :-1]), values)
    assert torch.equal(spread[0, 0], torch.tensor([0, 0, 1, 2, 3, 4, 0.0]))
    assert torch.equal(spread[0, 2], torch.tensor([9, 10, 11, 12, 0, 0, 0.0]))
    assert torch.count_nonzero(spread) == values.numel()


def test_spread_is_the_same_when_compiled():
    torch.compiler.reset()
    values = torch.randn(2, 5, 8)
    compiled = torch.compile(spread_distances, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values), spread_distances(values))


def test_expanded_tables():
    """Each row is that of the table; gradients of equal rows add up."""
    table = torch.randn(3, 2, 4, requires_grad=True)  # [S, H, D]
    selector = torch.nn.functional.one_hot(torch.tensor([2, 0, 0, 1, 0]), 3).float()
    rows = expand_table(selector, table)
    assert rows.is_contiguous()
    assert torch.equal(rows, table.detach()[[2, 0, 0, 1, 0]].transpose(0, 1))
    rows.sum().backward()
    assert torch.equal(table.grad[:, 0, 0], torch.tensor([3.0, 1, 1]))
