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
from functools import cached_property

import torch
from torch.autograd.function import once_differentiable

from DeBERTa.ops.cpu import library
from DeBERTa.ops.distances import view_distances
from DeBERTa.ops.dropout import compute_threshold, draw_keep_mask, draw_seed

# Rows of a block: fewer save more of the matmuls, but make them slower (measured for 128, 192, 256 and 512).
ROWS, FLOAT32_ROWS = 256, 128


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
        inputs = q, k, v, key_table, query_table
        saved = q.new_empty(batch, heads, length, length)
        context = q.new_empty(batch, length, heads, size)
        ctx.save_for_backward(*inputs, saved, context)
        ctx.p = p
        seed, mask = draw_seed() if p else 0, input_mask.bool().contiguous()
        kernel = _find_fused("compute_attention", q)
        if kernel is not None:
            kernel(*inputs, mask, saved, context, *q.shape, seed, compute_threshold(p), 1 / (1 - p))
            return context
        scores = q.new_empty(heads, length, length)
        c2p, p2c = _PositionTerm(key_table, length), _PositionTerm(query_table, length)
        for b in range(batch):
            c2p.multiply(q[b])
            p2c.multiply(k[b])
            torch.bmm(q[b], k[b].transpose(1, 2), out=scores)
            _write_probabilities(scores, c2p, p2c, mask[b], (seed, p, b * scores.numel()), saved[b])
            torch.mul(torch.bmm(scores, v[b]).transpose(0, 1), 1 / (1 - p), out=context[b])
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors  # once: gradient checkpointing allows no second time
        q, k, v, key_table, query_table, saved, context = tensors
        batch, heads, length, _ = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernel = _find_fused("compute_attention_gradients", q)
        if kernel is not None:
            tables = (key_table, query_table)
            dtables = [None if table is None else torch.empty_like(table) for table in tables]
            kernel(*tensors, grad.contiguous(), dq, dk, dv, *dtables, *q.shape, 1 / (1 - ctx.p))
            return dq, dk, dv, *dtables, None, None
        c2p, p2c = _PositionTerm(key_table, length), _PositionTerm(query_table, length)
        dscores, dropped = (q.new_empty(heads, length, length) for _ in range(2))
        for b in range(batch):
            inner = (context[b] * grad[b]).sum(-1).t()
            inner = inner.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
            dcontext = torch.mul(grad[b].transpose(0, 1), 1 / (1 - ctx.p)).contiguous()
            torch.bmm(dcontext, v[b].transpose(1, 2), out=dscores)
            _write_score_gradients(saved[b], dscores, inner, c2p, p2c, dropped)
            torch.bmm(dropped.transpose(1, 2), dcontext, out=dv[b])
            torch.bmm(dscores, k[b], out=dq[b])
            torch.bmm(dscores.transpose(1, 2), q[b], out=dk[b])
            c2p.add_gradients(q[b], dq[b])
            p2c.add_gradients(k[b], dk[b])
        return dq, dk, dv, c2p.sum_table(), p2c.sum_table(), None, None


def _find_fused(name: str, q: torch.Tensor) -> Callable[..., None] | None:
    """Return the fused attention kernel if L and D are multiples of 32, else None."""
    return library.find_kernel(name, q) if q.size(2) % 32 == 0 and q.size(3) % 32 == 0 else None


class _PositionTerm:
    """Scores, or their gradients, of a position term of one sequence, in row blocks.

    There are no blocks without a `table` [H, W, D]. `buffer` holds them in sequence, each contiguous
    [H, T, L + T - 1]. For gradients, they are zero outside of the view by distance.
    """

    def __init__(self, table: torch.Tensor | None, length: int) -> None:
        self.table = table
        self.buffer: torch.Tensor | None = None
        self.rows: list[slice] = []
        self.table_rows: list[slice] = []  # that a block needs
        self.parts: list[torch.Tensor] = []  # of the table, these rows
        self.blocks: list[torch.Tensor] = []
        if table is None:
            return
        for first in range(0, length, size := _count_rows(table)):
            last = min(first + size, length)
            self.rows.append(slice(first, last))
            self.table_rows.append(slice(length - last, 2 * length - 1 - first))
        self.parts = [table[:, rows] for rows in self.table_rows]
        shapes = [
            (len(table), r.stop - r.start, x.size(1)) for r, x in zip(self.rows, self.parts, strict=True)
        ]
        sizes = list(map(math.prod, shapes))
        self.buffer = table.new_zeros(sum(sizes))
        self.blocks = [x.view(shape) for x, shape in zip(self.buffer.split(sizes), shapes, strict=True)]

    @cached_property
    def tables(self) -> list[torch.Tensor]:
        """Return the parts of the table, contiguous: made once for all sequences."""
        return [part.contiguous() for part in self.parts]

    @cached_property
    def transposed(self) -> list[torch.Tensor]:
        """Return the parts of the table as contiguous columns."""
        return [part.transpose(1, 2).contiguous() for part in self.parts]

    @cached_property
    def grad_tables(self) -> list[torch.Tensor]:
        """Return the sums of the gradients of `tables`."""
        return [torch.zeros_like(table) for table in self.tables]

    def iterate_views(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows of each block and their scores, [H, T, L]."""
        for rows, block in zip(self.rows, self.blocks, strict=True):
            yield rows, view_distances(block, int(block.storage_offset()))

    def multiply(self, x: torch.Tensor) -> None:
        """Write the scores of `x` [H, L, D]."""
        for rows, table, block in zip(self.rows, self.transposed, self.blocks, strict=True):
            torch.bmm(x[:, rows], table, out=block)

    def add_gradients(self, x: torch.Tensor, dx: torch.Tensor) -> None:
        """Add the gradient of `x` [H, L, D] to `dx`, and that of the table to its sum."""
        parts = zip(self.rows, self.tables, self.grad_tables, self.blocks, strict=True)
        for rows, table, grad_table, block in parts:
            dx[:, rows] += torch.bmm(block, table)
            torch.baddbmm(grad_table, block.transpose(1, 2), x[:, rows], out=grad_table)

    def sum_table(self) -> torch.Tensor | None:
        """Return the gradient of the table, [H, W, D]."""
        if self.table is None:
            return None
        full = torch.zeros_like(self.table)
        for rows, grad_table in zip(self.table_rows, self.grad_tables, strict=True):
            full[:, rows] += grad_table
        return full


def _write_probabilities(
    scores: torch.Tensor,
    c2p: _PositionTerm,
    p2c: _PositionTerm,
    mask: torch.Tensor,
    dropout: tuple[int, float, int],
    saved: torch.Tensor,
) -> None:
    """Write the softmax of `scores` [H, L, L] and both terms to `scores`.

    Padded keys are excluded, and dropped elements are zero. `saved` receives the same probabilities, negated
    instead of zeroed where dropped. dropout: seed, probability, and the index of the first element.
    """
    seed, p, first = dropout
    kernel = library.find_kernel("compute_probabilities", scores)
    if kernel is not None:
        sizes = (*scores.shape[:2], _count_rows(scores))
        kernel(scores, saved, c2p.buffer, p2c.buffer, mask, *sizes, seed, first, compute_threshold(p))
        return
    for rows, term in c2p.iterate_views():
        scores[:, rows] += term
    for rows, term in p2c.iterate_views():
        scores[:, :, rows] += term.transpose(1, 2).contiguous()  # adding the view takes three times as long
    scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    torch.softmax(scores, dim=-1, out=saved).mul_(mask[:, None])
    if p:
        saved.mul_(draw_keep_mask(saved.shape, seed, p, first).to(saved.dtype).mul_(2).sub_(1))
    torch.clamp(saved, min=0, out=scores)


def _write_score_gradients(
    saved: torch.Tensor,
    gradients: torch.Tensor,
    inner: torch.Tensor,
    c2p: _PositionTerm,
    p2c: _PositionTerm,
    dropped: torch.Tensor,
) -> None:
    """Turn gradients of the probabilities into those of the scores, in place.

    These are P dP - P `inner`, with P = `saved` [H, L, L] and `inner` [H, L]. Gradients of dropped elements
    are zero. The gradients are also written to the blocks of both terms. `dropped` receives the probabilities
    that multiplied v.
    """
    kernel = library.find_kernel("compute_score_gradients", gradients)
    if kernel is not None:
        sizes = (*saved.shape[:2], _count_rows(saved))
        kernel(saved, gradients, dropped, c2p.buffer, p2c.buffer, inner, *sizes)
        return
    torch.clamp(saved, min=0, out=dropped)
    gradients.mul_(dropped).sub_(saved.abs().mul_(inner[:, :, None]))
    for rows, term in c2p.iterate_views():
        term.copy_(gradients[:, rows])
    for rows, term in p2c.iterate_views():
        term.copy_(gradients[:, :, rows].transpose(1, 2))


def _count_rows(x: torch.Tensor) -> int:
    """Return the number of rows of a block."""
    return FLOAT32_ROWS if x.dtype == torch.float32 else ROWS
