"""Disentangled attention on a CPU, computed one sequence at a time.

The scores of a sequence stay in the cache.

Shapes: B batch, H heads, L length, D head size, W = 2L - 1 distances, T rows of a block.

The position terms are matmuls with one table row per *distance*, [L, W]. Row i of the [L, L] scores is a
contiguous slice of row i of the result, which starts one element earlier than that of row i - 1: a strided
view instead of a gather. Its backward pass copies into the same view of a buffer of zeros instead of a
scatter. T rows need only L + T - 1 of the distances, so that blocks of rows save up to half of the matmul.

In bfloat16 on processors with AMX a fused kernel uses the same formulas: csrc/attention.cpp.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from DeBERTa.ops.cpu import library
from DeBERTa.ops.distances import view_distances
from DeBERTa.ops.dropout import compute_threshold, draw_keep_mask, draw_seed

# Rows of a block: fewer save more of the matmuls, but make them slower (measured for 128, 192, 256 and 512).
ROWS, FLOAT32_ROWS = 256, 128


def iterate_row_blocks(length: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of `rows` rows, and the rows of the table [W, D] that they need."""
    for first in range(0, length, rows):
        last = min(first + rows, length)
        yield slice(first, last), slice(length - last, 2 * length - 1 - first)


class BlockedAttention(torch.autograd.Function):
    """Attention softmax(q k^T + c2p + p2c) v with dropout on the probabilities.

    Inputs, contiguous: `q` (scaled already), `k`, `v` [B, H, L, D]; `key_table` [H, W, D] for c2p, ordered
    from distance L - 1 down; `query_table` [H, W, D] (scaled) for p2c, ordered from -(L - 1) up; either may
    be None; `input_mask` bool [B, L]; dropout probability `p`. Output: context [B, L, H, D], zero at padded
    queries.

    For the backward pass the probabilities are saved once, negative where dropped. The inner product of
    probabilities and gradient that softmax needs per row is that of the context and its gradient
    (FlashAttention, section B.2).
    """

    @staticmethod
    def forward(ctx, q, k, v, key_table, query_table, input_mask, p):  # noqa: PLR0913  autograd's inputs
        batch, heads, length, size = q.shape
        kept = q.new_empty(batch, heads, length, length)
        context = q.new_empty(batch, length, heads, size)
        ctx.save_for_backward(q, k, v, key_table, query_table, kept, context)
        ctx.p = p
        seed = draw_seed() if p else 0
        kernel = _fused("attention", q)
        if kernel is not None:
            mask, scale = input_mask.bool().contiguous(), 1 / (1 - p)
            kernel(
                q,
                k,
                v,
                key_table,
                query_table,
                mask,
                kept,
                context,
                *q.shape,
                seed,
                compute_threshold(p),
                scale,
            )
            return context
        scores = q.new_empty(heads, length, length)
        c2p, p2c = _PositionTerm(key_table, length), _PositionTerm(query_table, length)
        for b in range(batch):
            c2p.multiply(q[b])
            p2c.multiply(k[b])
            torch.bmm(q[b], k[b].transpose(1, 2), out=scores)
            _probabilities(scores, c2p, p2c, input_mask[b], _Bits(seed, p, b * scores.numel()), kept[b])
            torch.mul(torch.bmm(scores, v[b]).transpose(0, 1), 1 / (1 - p), out=context[b])
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, key_table, query_table, kept, context = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernel = _fused("attention_gradients", q)
        if kernel is not None:
            dtables = [
                None if table is None else torch.empty_like(table) for table in (key_table, query_table)
            ]
            known = (q, k, v, key_table, query_table, kept, context, grad.contiguous())
            kernel(*known, dq, dk, dv, *dtables, *q.shape, 1 / (1 - ctx.p))
            return dq, dk, dv, *dtables, None, None
        c2p, p2c = _PositionGradient(key_table, length), _PositionGradient(query_table, length)
        dscores, dropped = (q.new_empty(heads, length, length) for _ in range(2))
        for b in range(batch):
            inner = (context[b] * grad[b]).sum(-1).t().to(_sum_dtype(q)).contiguous()
            dcontext = torch.mul(grad[b].transpose(0, 1), 1 / (1 - ctx.p)).contiguous()
            torch.bmm(dcontext, v[b].transpose(1, 2), out=dscores)
            _score_gradients(kept[b], dscores, inner, c2p, p2c, dropped)
            torch.bmm(dropped.transpose(1, 2), dcontext, out=dv[b])
            torch.bmm(dscores, k[b], out=dq[b])
            torch.bmm(dscores.transpose(1, 2), q[b], out=dk[b])
            c2p.add(q[b], dq[b])
            p2c.add(k[b], dk[b])
        return dq, dk, dv, c2p.sum_table(), p2c.sum_table(), None, None


def _fused(name: str, q: torch.Tensor) -> Callable[..., None] | None:
    """Return the fused attention kernel if L and D are multiples of 32, else None."""
    return library.find_kernel(name, q) if q.size(2) % 32 == 0 and q.size(3) % 32 == 0 else None


class _Blocks:
    """Memory for a position term of one sequence, in blocks of rows.

    There are no blocks without a `table` [H, W, D]. `buffer` holds the blocks in sequence, each contiguous
    [H, T, L + T - 1].
    """

    def __init__(self, table: torch.Tensor | None, length: int) -> None:
        self.table, self.length = table, length
        self.most = _block_rows(table)
        self.buffer: torch.Tensor | None = None
        self.rows: list[slice] = []
        self.tables: list[torch.Tensor] = []  # of the table
        self.blocks: list[torch.Tensor] = []
        if table is not None:
            self.rows, columns = (
                list(slices) for slices in zip(*iterate_row_blocks(length, self.most), strict=True)
            )
            self.tables = [table[:, part] for part in columns]
            shapes = [
                (len(table), r.stop - r.start, p.size(1)) for r, p in zip(self.rows, self.tables, strict=True)
            ]
            sizes = [math.prod(shape) for shape in shapes]
            self.buffer = table.new_empty(sum(sizes))
            self.blocks = [b.view(shape) for b, shape in zip(self.buffer.split(sizes), shapes, strict=True)]

    def iterate_views(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows of each block and their scores, [H, T, L]."""
        return (
            (rows, view_distances(b, int(b.storage_offset())))
            for rows, b in zip(self.rows, self.blocks, strict=True)
        )


class _PositionTerm(_Blocks):
    """Matmul of queries or keys with their table, in blocks of rows."""

    def __init__(self, table: torch.Tensor | None, length: int) -> None:
        super().__init__(table, length)
        self.tables = [part.transpose(1, 2).contiguous() for part in self.tables]  # once for all sequences

    def multiply(self, x: torch.Tensor) -> None:
        """Fill the blocks for `x` [H, L, D]."""
        for rows, part, block in zip(self.rows, self.tables, self.blocks, strict=True):
            torch.bmm(x[:, rows], part, out=block)


class _PositionGradient(_Blocks):
    """Gradients of a position term, in blocks of rows.

    Blocks are zero outside of the view by distance.
    """

    def __init__(self, table: torch.Tensor | None, length: int) -> None:
        super().__init__(table, length)
        self.tables = [part.contiguous() for part in self.tables]
        self.grad_tables = [torch.zeros_like(part) for part in self.tables]
        if self.buffer is not None:
            self.buffer.zero_()

    def add(self, x: torch.Tensor, dx: torch.Tensor) -> None:
        """Add the gradient of `x` [H, L, D] to `dx`, and that of the table to its sum."""
        for rows, part, grad_part, block in zip(
            self.rows, self.tables, self.grad_tables, self.blocks, strict=True
        ):
            dx[:, rows] += torch.bmm(block, part)
            torch.baddbmm(grad_part, block.transpose(1, 2), x[:, rows], out=grad_part)

    def sum_table(self) -> torch.Tensor | None:
        """Return the gradient of the table, [H, W, D]."""
        if self.table is None:
            return None
        full = torch.zeros_like(self.table)
        for (_, columns), grad_part in zip(
            iterate_row_blocks(self.length, self.most), self.grad_tables, strict=True
        ):
            full[:, columns] += grad_part
        return full


class _Bits(NamedTuple):
    """Random bits of a dropout mask for `seed`, starting at element `first`."""

    seed: int
    p: float
    first: int


def _probabilities(
    scores: torch.Tensor,
    c2p: _PositionTerm,
    p2c: _PositionTerm,
    input_mask: torch.Tensor,
    bits: _Bits,
    kept: torch.Tensor,
) -> None:
    """Write the softmax of `scores` [H, L, L] and both terms to `scores`.

    Padded keys are excluded, and dropped elements are zero. `kept` receives the same probabilities, negated
    instead of zeroed where dropped.
    """
    kernel = library.find_kernel("probabilities", scores)
    if kernel is not None:
        mask = input_mask.bool().contiguous()
        sizes = (*scores.shape[:2], _block_rows(scores))
        threshold = compute_threshold(bits.p)
        kernel(scores, kept, c2p.buffer, p2c.buffer, mask, *sizes, bits.seed, bits.first, threshold)
        return
    for rows, term in c2p.iterate_views():
        scores[:, rows] += term
    for rows, term in p2c.iterate_views():
        scores[:, :, rows] += term.transpose(1, 2).contiguous()  # adding the view takes three times as long
    scores.masked_fill_(~input_mask, torch.finfo(scores.dtype).min)
    torch.softmax(scores, dim=-1, out=kept).mul_(input_mask[:, None])
    if bits.p:
        mask = draw_keep_mask(kept.shape, bits.seed, bits.p, bits.first)
        kept.mul_(mask.to(kept.dtype).mul_(2).sub_(1))
    torch.clamp(kept, min=0, out=scores)


def _score_gradients(
    kept: torch.Tensor,
    gradients: torch.Tensor,
    inner: torch.Tensor,
    c2p: _PositionGradient,
    p2c: _PositionGradient,
    dropped: torch.Tensor,
) -> None:
    """Turn gradients of the probabilities into those of the scores, in place.

    These are P dP - P `inner`, with P = `kept` [H, L, L] and `inner` [H, L]. Gradients of dropped elements
    are zero. The gradients are also written to the blocks of both terms. `dropped` receives the probabilities
    that multiplied v.
    """
    kernel = library.find_kernel("score_gradients", gradients)
    if kernel is not None:
        heads, length, _ = kept.shape
        kernel(kept, gradients, dropped, c2p.buffer, p2c.buffer, inner, heads, length, _block_rows(kept))
        return
    torch.clamp(kept, min=0, out=dropped)
    gradients.mul_(dropped).sub_(kept.abs().mul_(inner[:, :, None]))
    for rows, term in c2p.iterate_views():
        term.copy_(gradients[:, rows])
    for rows, term in p2c.iterate_views():
        term.copy_(gradients[:, :, rows].transpose(1, 2))


def _block_rows(x: torch.Tensor | None) -> int:
    """Return the number of rows of a block."""
    return FLOAT32_ROWS if x is not None and x.dtype == torch.float32 else ROWS


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.promote_types(x.dtype, torch.float32)
