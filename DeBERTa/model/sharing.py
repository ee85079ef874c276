"""Embedding tables of generator and discriminator: GDES, ES and NES (DeBERTaV3, section 3.3).

Sharing is explicit: the generator's tables are handed to the discriminator's forward pass as tensors, and each kind of
table decides what it takes from them. Shapes: V rows, E embedding width.

| sharing | the discriminator's table is           | kind of table   | gradient of the RTD loss goes to |
| ------- | -------------------------------------- | --------------- | -------------------------------- |
| gdes    | stop_gradient(generator's) + residual  | `ResidualTable` | the residual                     |
| es      | the generator's                        | `BorrowedTable` | the generator's table            |
| nes     | its own                                | `OwnTable`      | its own table                    |
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
    """Rows of a table, and the table itself for the product at the other end: one place where both gradients arrive.

    `TiedLookup.apply(table [V, E], ids [...])` gives `table[ids]` [..., E] and `table`. Its backward adds the rows'
    gradients to the table's where they are, without a second table of zeros.
    """

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, drows, dtable):
        (ids,) = ctx.saved_tensors
        return dtable.index_put_((ids,), drows.to(dtable.dtype), accumulate=True), None


class OwnTable(nn.Embedding):
    """A table of its own (a generator's, or NES)."""

    def forward(self, ids: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [..., E] for int64 `ids` [...]; `base` is not used."""
        return super().forward(ids)

    def full(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """The effective table [V, E]."""
        return self.weight


class ResidualTable(nn.Module):
    """GDES: the sum of another model's table, which gets no gradient, and a residual that starts at zero."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """`base[ids] + residual[ids]`, [..., E]: the sum of the whole tables is never made."""
        return F.embedding(ids, base.detach()) + F.embedding(ids, self._weight)

    def full(self, base: torch.Tensor) -> torch.Tensor:
        return base.detach() + self._weight


class BorrowedTable(nn.Module):
    """ES: another model's table, which gets the gradients of both losses."""

    def forward(self, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, base)

    def full(self, base: torch.Tensor) -> torch.Tensor:
        return base


EmbeddingTable = OwnTable | ResidualTable | BorrowedTable


def make_table(sharing: str, rows: int, width: int) -> EmbeddingTable:
    """The discriminator's table for "gdes", "es" or "nes"."""
    if sharing == "es":
        return BorrowedTable()
    return ResidualTable(rows, width) if sharing == "gdes" else OwnTable(rows, width)
