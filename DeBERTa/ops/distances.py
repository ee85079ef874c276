"""Position terms with one table row per distance instead of one per slot.

Scores of rows (queries for c2p, keys for p2c) by distance are shifted by one element from row to row. A
strided view therefore replaces the gather, and a copy into this view the scatter of its backward pass.
Nothing is added atomically, so that gradients have the same bits every time.

Shapes: L length, T rows of a block, W rows of an expanded table, S rows of the relative-position table.
"""

from typing import NamedTuple, cast

import torch
from torch.nn import functional as F

from DeBERTa.model.attention import RelativePositions
from DeBERTa.model.encoder import Encoder
from DeBERTa.ops.autocast import AutocastModule


class ExpandedPositions(NamedTuple):
    """Relative positions with matrices that expand tables to a row per distance.

    The other fields are those of `RelativePositions`.
    key_selector, query_selector: one-hot [W, S] in the dtype of matmuls, for the distances row - column.
    Rows are queries for the key table (c2p), and keys for the query table (p2c).
    """

    table: torch.Tensor
    distance_slots: torch.Tensor
    slots: torch.Tensor
    key_selector: torch.Tensor
    query_selector: torch.Tensor


class ExpandingEncoder(AutocastModule, Encoder):
    """Base class of encoders for attention by distance.

    They read multiples of 8 rows of the relative-position table, for which matmuls on GPUs are fastest.
    """

    table_alignment = 8

    def compute_relative_positions(self, length: int) -> RelativePositions | None:
        """Return relative positions for `length`, None without relative attention."""
        positions = super().compute_relative_positions(length)
        if positions is None:
            return None
        distances = self.list_distances(length, positions.slots.device)
        dtype = self.get_matmul_dtype(positions.table)
        selectors = (_select(positions, sign * distances).to(dtype) for sign in (1, -1))
        return cast(RelativePositions, ExpandedPositions(*positions, *selectors))

    def list_distances(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the distances row - column of the rows of an expanded table, int64 [W]."""
        raise NotImplementedError


def _select(positions: RelativePositions, distances: torch.Tensor) -> torch.Tensor:
    """Return bool [W, S], true at the table row of each distance.

    Distances past L repeat the last row.
    """
    last = positions.slots.size(0) - 1
    slots = positions.distance_slots[last - distances.clamp(-last, last)]
    return slots[:, None] == torch.arange(positions.table.size(0), device=distances.device)


def expand_tables(
    positions: RelativePositions | None, key_table: torch.Tensor | None, query_table: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return tables [S, H, D] as [H, W, D], a row per distance, or None of None.

    The results are contiguous.
    positions: from an `ExpandingEncoder`.
    """
    if positions is None:
        return None, None
    *_, key_selector, query_selector = cast(ExpandedPositions, positions)
    return expand_table(key_selector, key_table), expand_table(query_selector, query_table)


def expand_table(selector: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows [H, W, D] of a table that a selector selects, if any.

    table: [S, H, D]. selector: one-hot [W, S].
    """
    if table is None:
        return None
    return torch.bmm(selector.expand(table.size(1), -1, -1), table.transpose(0, 1))


def view_distances(scores: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the view [..., T, L] by distance of `scores` [..., T, L + T - 1].

    It is dense in the last dimension.
    Element (r, c) is `scores[r, T - 1 - r + c]`. `offset` is the storage offset of `scores`.

    For all rows, T = L. With table rows ordered from distance L - 1 down to -(L - 1), rows r as queries and
    columns c as keys, that is the entry of distance r - c; ordered upwards, rows as keys and columns as
    queries, that of c - r.
    """
    rows, width = scores.shape[-2:]
    strides = (*scores.stride()[:-2], scores.stride(-2) - 1, 1)
    return scores.as_strided((*scores.shape[:-1], width - rows + 1), strides, offset + rows - 1)


def spread_distances(values: torch.Tensor) -> torch.Tensor:
    """Return [..., T, L + T] with `values` [..., T, L] in its view by distance.

    Other elements are zero. The view is that of all columns but the last.
    """
    rows, length = values.shape[-2:]
    if torch.compiler.is_compiling():  # fused; the compiler takes no writes into views
        padded = F.pad(values, (0, rows - 1)).flatten(-2)
        return F.pad(padded, (rows - 1, 1)).unflatten(-1, (rows, -1))
    spread = values.new_empty(*values.shape[:-1], length + rows)
    view_distances(spread[..., :-1]).copy_(values)
    strides = (*spread.stride()[:-2], length + rows - 1, 1)
    spread.as_strided((*values.shape[:-1], rows - 1), strides).zero_()  # before each row of the view
    spread[..., -1, length:].zero_()  # after the last one
    return spread
