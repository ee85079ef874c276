"""Disentangled attention on a CPU: one sequence at a time, so that scores stay in the cache, with its own backward.

Shapes: B batch, H heads, L length, D head size, W = 2L - 1 distances, T rows of a block.

The position terms are products with one table row per *distance*, [L, W]. Where `c2p[i, w]` belongs to distance
`i - j`, row i of the [L, L] scores is a stretch of row i of the product that starts one element earlier than that of
row i - 1: a strided view, where the published code gathers. Its backward pass is a copy into the same view of a buffer
of zeros, where the published code scatters. T rows need only L + T - 1 of the distances, so that blocks of rows save
up to half of the product.
"""

from collections.abc import Iterator

import torch

from DeBERTa.model.dropout import negate_dropped

ROWS = 256  # of a block: fewer save more of the products, but make them slower (measured for 128, 256, 512)


def distance_view(product: torch.Tensor) -> torch.Tensor:
    """View [..., T, L] of contiguous `product` [..., T, L + T - 1]: element (r, c) is `product[r, T - 1 - r + c]`.

    For all rows, T = L. With table rows ordered from distance L - 1 down to -(L - 1), rows r as queries and columns c
    as keys, that is the entry of distance r - c; ordered upwards, rows as keys and columns as queries, that of c - r.
    """
    rows, width = product.shape[-2:]
    outer = product.stride()[:-2]
    return product.as_strided((*product.shape[:-1], width - rows + 1), (*outer, width - 1, 1), rows - 1)


def row_blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Rows of each block, and the rows of the table [W, D] that they need."""
    for first in range(0, length, ROWS):
        last = min(first + ROWS, length)
        yield slice(first, last), slice(length - last, 2 * length - 1 - first)


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T + c2p + p2c) v, with dropout on the probabilities.

    Inputs: `q` (scaled already), `k`, `v` [B, H, L, D]; `key_table` [H, W, D] for c2p, ordered from distance L - 1
    down; `query_table` [H, W, D] (scaled) for p2c, ordered from -(L - 1) up; either may be None; `input_mask` bool
    [B, L]; dropout probability `p`. Output: context [B, L, H, D], zero at padded queries.

    For the backward pass the probabilities are kept once, negative where dropped. What the softmax needs of each row,
    the inner product of probabilities and gradient, is that of the context and its gradient (FlashAttention, section
    B.2): no pass over the probabilities.
    """

    @staticmethod
    def forward(ctx, q, k, v, key_table, query_table, input_mask, p):
        batch, heads, length, size = q.shape
        kept = q.new_empty(batch, heads, length, length)
        context = q.new_empty(batch, length, heads, size)
        scores = q.new_empty(heads, length, length)
        key_blocks, query_blocks = (_table_blocks(table, length, transpose=True) for table in (key_table, query_table))
        for b in range(batch):
            for rows, table in query_blocks:
                # Copying the transposed view, and adding to that, takes a third of adding the view.
                scores[:, :, rows] = distance_view(torch.bmm(k[b, :, rows], table)).transpose(1, 2)
            for rows, table in key_blocks:
                term = distance_view(torch.bmm(q[b, :, rows], table))
                if query_blocks:
                    scores[:, rows] += term
                else:
                    scores[:, rows] = term
            torch.baddbmm(scores, q[b], k[b].transpose(1, 2), beta=int(bool(key_blocks or query_blocks)), out=scores)
            padded = not bool(input_mask[b].all())
            if padded:
                scores.masked_fill_(~input_mask[b], torch.finfo(scores.dtype).min)
            probs = torch.softmax(scores, dim=-1, out=kept[b])
            if padded:
                probs *= input_mask[b][:, None]
            if p:
                probs = torch.clamp(negate_dropped(probs, p), min=0, out=scores)
            torch.mul(torch.bmm(probs, v[b]).transpose(0, 1), 1 / (1 - p), out=context[b])
        ctx.save_for_backward(q, k, v, key_table, query_table, kept, context)
        ctx.p = p
        return context

    @staticmethod
    def backward(ctx, grad):
        q, k, v, key_table, query_table, kept, context = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        key_term, query_term = (_PositionBackward(table, length) for table in (key_table, query_table))
        dscores, dropped = (q.new_empty(heads, length, length) for _ in range(2))
        for b in range(batch):
            # Softmax: dS = P dP - P sum(P dP), where dP is zero if dropped, else scaled.
            inner = (context[b] * grad[b]).sum(-1).t().unsqueeze(-1)
            dcontext = torch.mul(grad[b].transpose(0, 1), 1 / (1 - ctx.p)).contiguous()
            torch.bmm(dcontext, v[b].transpose(1, 2), out=dscores)
            if ctx.p:
                torch.clamp(kept[b], min=0, out=dropped)
                torch.bmm(dropped.transpose(1, 2), dcontext, out=dv[b])
                dscores.mul_(dropped).addcmul_(torch.abs(kept[b], out=dropped), inner, value=-1)
            else:
                torch.bmm(kept[b].transpose(1, 2), dcontext, out=dv[b])
                dscores.sub_(inner).mul_(kept[b])
            torch.bmm(dscores, k[b], out=dq[b])
            torch.bmm(dscores.transpose(1, 2), q[b], out=dk[b])
            key_term.add(dscores, q[b], dq[b])
            query_term.add(dscores.transpose(1, 2), k[b], dk[b])
        return dq, dk, dv, key_term.dtable(), query_term.dtable(), None, None


def _table_blocks(table: torch.Tensor | None, length: int, transpose: bool) -> list[tuple[slice, torch.Tensor]]:
    """Rows of each block and its part of `table` [H, W, D], cut out once for all sequences; nothing without a table."""
    if table is None:
        return []
    parts = ((rows, table[:, columns]) for rows, columns in row_blocks(length))
    return [(rows, (part.transpose(1, 2) if transpose else part).contiguous()) for rows, part in parts]


class _PositionBackward:
    """Gradients of a position term: of its table [H, W, D], or None, over all sequences, and of the other factor."""

    def __init__(self, table: torch.Tensor | None, length: int) -> None:
        self.table = table
        self.length = length
        self.blocks = [
            (rows, part, torch.zeros_like(part), part.new_zeros(len(part), rows.stop - rows.start, part.size(1)))
            for rows, part in _table_blocks(table, length, transpose=False)
        ]

    def add(self, dscores: torch.Tensor, x: torch.Tensor, dx: torch.Tensor) -> None:
        """Add the gradient of `x` [H, L, D] to `dx`; `dscores` [H, L, L], its rows those of x."""
        for rows, table, dtable, band in self.blocks:
            distance_view(band).copy_(dscores[:, rows])  # the rest of the band stays zero
            dx[:, rows] += torch.bmm(band, table)
            torch.baddbmm(dtable, band.transpose(1, 2), x[:, rows], out=dtable)

    def dtable(self) -> torch.Tensor | None:
        """[H, W, D]"""
        if self.table is None:
            return None
        whole = torch.zeros_like(self.table)
        for (_, columns), (_, _, dtable, _) in zip(row_blocks(self.length), self.blocks, strict=True):
            whole[:, columns] += dtable
        return whole
