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

from DeBERTa.model.dropout import keep_mask

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
    [B, L]; dropout probability `p`. Output: context [B, H, L, D], zero at padded queries.

    For the backward pass the probabilities are kept once, with the sign for the dropout mask.
    """

    @staticmethod
    def forward(ctx, q, k, v, key_table, query_table, input_mask, p):
        batch, heads, length, _ = q.shape
        kept = q.new_empty(batch, heads, length, length)
        context = torch.empty_like(v)
        scores = q.new_empty(heads, length, length)
        other = torch.empty_like(scores)
        for b in range(batch):
            torch.bmm(q[b], k[b].transpose(1, 2), out=scores)
            if key_table is not None:
                for rows, table in row_blocks(length):
                    scores[:, rows] += distance_view(torch.bmm(q[b, :, rows], key_table[:, table].transpose(1, 2)))
            if query_table is not None:
                for rows, table in row_blocks(length):
                    product = torch.bmm(k[b, :, rows], query_table[:, table].transpose(1, 2))
                    # Adding the transposed view would take four times as long as this copy.
                    other[:, :, rows] = distance_view(product).transpose(1, 2)
                scores += other
            padded = not bool(input_mask[b].all())
            if padded:
                scores.masked_fill_(~input_mask[b], torch.finfo(scores.dtype).min)
            probs = torch.softmax(scores, dim=-1)
            if padded:
                probs *= input_mask[b][:, None]
            if p:
                dropped = keep_mask(other, p).mul_(probs)
                torch.bmm(dropped, v[b], out=context[b])
                torch.sub(dropped, probs, alpha=0.5, out=kept[b])  # +-P/2, exact
            else:
                torch.bmm(probs, v[b], out=context[b])
                torch.mul(probs, 0.5, out=kept[b])
        context *= 1 / (1 - p)
        ctx.save_for_backward(q, k, v, key_table, query_table, kept)
        ctx.p = p
        return context

    @staticmethod
    def backward(ctx, grad):
        q, k, v, key_table, query_table, kept = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        scale = 1 / (1 - ctx.p)
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dkey_table = None if key_table is None else torch.zeros_like(key_table)
        dquery_table = None if query_table is None else torch.zeros_like(query_table)
        dprobs = q.new_empty(heads, length, length)
        bands: dict[int, torch.Tensor] = {}  # zeros but for the view, by rows of a block
        for b in range(batch):
            probs = kept[b].clamp(min=0).mul_(2 * scale)  # dropped and scaled
            torch.bmm(probs.transpose(1, 2), grad[b], out=dv[b])
            torch.bmm(grad[b], v[b].transpose(1, 2), out=dprobs)
            # Softmax: dS = P dP - P sum(P dP), with P dP = dropped P times the gradient that comes in.
            dscores = dprobs.mul_(probs)
            correction = dscores.sum(-1, keepdim=True)
            dscores.addcmul_(torch.abs(kept[b], out=probs), correction, value=-2)
            torch.bmm(dscores, k[b], out=dq[b])
            torch.bmm(dscores.transpose(1, 2), q[b], out=dk[b])
            if key_table is not None:
                _position_backward(dscores, q[b], key_table, dq[b], dkey_table, bands)
            if query_table is not None:
                _position_backward(dscores.transpose(1, 2), k[b], query_table, dk[b], dquery_table, bands)
        return dq, dk, dv, dkey_table, dquery_table, None, None


def _position_backward(
    dscores: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    dx: torch.Tensor,
    dtable: torch.Tensor,
    bands: dict[int, torch.Tensor],
) -> None:
    """Add the gradients of `x` [H, L, D] and `table` [H, W, D] to `dx` and `dtable`; `dscores` [H, L, L], rows as x."""
    heads, length, _ = x.shape
    for rows, columns in row_blocks(length):
        count = rows.stop - rows.start
        if count not in bands:
            bands[count] = x.new_zeros(heads, count, length + count - 1)
        band = bands[count]
        distance_view(band).copy_(dscores[:, rows])
        dx[:, rows].baddbmm_(band, table[:, columns])
        dtable[:, columns].baddbmm_(band.transpose(1, 2), x[:, rows])
