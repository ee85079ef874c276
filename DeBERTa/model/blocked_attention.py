"""Disentangled attention on a CPU: one sequence at a time, so that scores stay in the cache, with its own backward.

Shapes: B batch, H heads, L length, D head size, W = 2L - 1 distances.

The position terms are products with one table row per *distance*, [L, W]. Where `c2p[i, w]` belongs to distance
`i - j`, row i of the [L, L] scores is a stretch of row i of the product that starts one element earlier than that of
row i - 1: a strided view, where the published code gathers. Its backward pass is a copy into the same view of a buffer
of zeros, where the published code scatters.
"""

import torch

from DeBERTa.model.dropout import keep_mask


def distance_view(product: torch.Tensor) -> torch.Tensor:
    """View [..., L, L] of contiguous `product` [..., L, W]: element (r, c) is `product[r, L - 1 - r + c]`.

    With table rows ordered from distance L - 1 down to -(L - 1), rows r as queries and columns c as keys, that is the
    entry of distance r - c; ordered upwards, rows as keys and columns as queries, that of distance c - r.
    """
    length, width = product.shape[-2:]
    outer = product.stride()[:-2]
    return product.as_strided((*product.shape[:-1], length), (*outer, width - 1, 1), length - 1)


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
        width = 2 * length - 1
        scores = q.new_empty(heads, length, length)
        product = q.new_empty(heads, length, width)
        dropped = torch.empty_like(scores) if p else None
        kept = q.new_empty(batch, heads, length, length)
        context = torch.empty_like(v)
        for b in range(batch):
            torch.bmm(q[b], k[b].transpose(1, 2), out=scores)
            if key_table is not None:
                torch.bmm(q[b], key_table.transpose(1, 2), out=product)
                scores += distance_view(product)
            if query_table is not None:
                torch.bmm(k[b], query_table.transpose(1, 2), out=product)
                scores += distance_view(product).transpose(1, 2)
            padded = not bool(input_mask[b].all())
            if padded:
                scores.masked_fill_(~input_mask[b], torch.finfo(scores.dtype).min)
            probs = torch.softmax(scores, dim=-1)
            if padded:
                probs *= input_mask[b][:, None]
            if p:
                keep_mask(dropped, p).mul_(probs)
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
        by_query = by_key = dkey_table = dquery_table = None
        if key_table is not None:
            by_query, dkey_table = q.new_zeros(heads, length, 2 * length - 1), torch.zeros_like(key_table)
        if query_table is not None:
            by_key, dquery_table = q.new_zeros(heads, length, 2 * length - 1), torch.zeros_like(query_table)
        dprobs = q.new_empty(heads, length, length)
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
                distance_view(by_query).copy_(dscores)
                dq[b].baddbmm_(by_query, key_table)
                dkey_table.baddbmm_(by_query.transpose(1, 2), q[b])
            if query_table is not None:
                distance_view(by_key).copy_(dscores.transpose(1, 2))
                dk[b].baddbmm_(by_key, query_table)
                dquery_table.baddbmm_(by_key.transpose(1, 2), k[b])
        return dq, dk, dv, dkey_table, dquery_table, None, None
