"""Embedding sharing between generator and discriminator: GDES, ES and NES.

Source: DeBERTaV3, sections 3.2 and 3.3.

Sharing is explicit: the discriminator's forward pass receives the generator's tables as tensors, and each
kind of table uses them in its own way. Shapes: V rows (tokens, or positions), E embedding width.

| sharing | the discriminator's table is           | kind of table    | gradient of the RTD loss goes to |
| ------- | -------------------------------------- | ---------------- | -------------------------------- |
| gdes    | stop_gradient(generator's) + residual  | `ResidualTable`  | the residual                     |
| es      | the generator's                        | `GeneratorTable` | the generator's table            |
| nes     | its own                                | `OwnTable`       | its own table                    |
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class SharedTables(NamedTuple):
    """The generator's word and position tables, each [V, E]."""

    word: torch.Tensor
    position: torch.Tensor


class TiedLookup(torch.autograd.Function):
    """Embedding lookup that returns the table, too, so that both gradients meet here.

    `TiedLookup.apply(table [V, E], ids [...])` returns `table[ids]` [..., E] and `table`. The backward pass
    adds the rows' gradients to the table's in place, without a second table of zeros.
    """

    @staticmethod
    def forward(ctx, table, ids):
        """Return the rows and a view of the table."""
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, grad_rows, grad_table):
        """Return the table's gradient."""
        (ids,) = ctx.saved_tensors
        # Not index_put_(accumulate=True): on a CPU it adds rows of equal ids in the order of its threads.
        return grad_table.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2).to(grad_table.dtype)), None


class OwnTable(nn.Embedding):
    """Table that is not shared: a generator's, or a discriminator's under NES."""

    def forward(self, ids: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Return the rows [..., E] of int64 `ids` [...], without using `base`."""
        return super().forward(ids)


class ResidualTable(nn.Module):
    """GDES table: another model's, without gradient, plus a residual initialized to 0."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(rows, width))  # the published name

    def forward(self, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return `base[ids] + residual[ids]` [..., E] without adding full tables."""
        return F.embedding(ids, base.detach()) + F.embedding(ids, self._weight)


class GeneratorTable(nn.Module):
    """ES table: another model's, which receives the gradients of both losses."""

    def forward(self, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., E] of int64 `ids` [...]."""
        return F.embedding(ids, base)


EmbeddingTable = OwnTable | ResidualTable | GeneratorTable


def make_table(sharing: str, rows: int, width: int) -> EmbeddingTable:
    """Create a table for "gdes", "es" or "nes"; a model that shares none has "nes"."""
    if sharing == "es":
        return GeneratorTable()
    return ResidualTable(rows, width) if sharing == "gdes" else OwnTable(rows, width)
