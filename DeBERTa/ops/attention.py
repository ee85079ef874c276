"""Attention on PyTorch's fused operations (`--attention sdpa`).

Position scores are the bias of these operations.
Shapes: B batch, L keys, M queries, H heads, D head size, h hidden size.
S is the number of rows of the relative-position table.
"""

import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa.model.attention import DisentangledSelfAttention, Keys, RelativePositions, expand_slots
from DeBERTa.ops.distances import ExpandingEncoder, expand_tables, spread_distances, view_distances

BLOCK_ROWS = 64  # of scores by distance; more rows need more distances, fewer make matmuls slower
MASKED_SCORE = -30000.0  # its exponential is 0 in every dtype; float16 holds it
MASK_COLUMNS = 8  # of keys in the p2c matmul: one would do, but matmuls on GPUs need multiples of 8


class SdpaEncoder(ExpandingEncoder):
    """Encoder whose expanded tables are windows [n, L + T] of distances.

    There is one window per block of T rows.
    """

    def list_distances(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the distances row - column of an expanded table, int64 [n * (L + T)].

        The last one of each window is not used: it makes the width of scores even.
        """
        rows = count_block_rows(length)
        starts = torch.arange(rows - 1, length, rows, device=device)
        return (starts[:, None] - torch.arange(length + rows, device=device)).flatten()


def count_block_rows(length: int) -> int:
    """Return the rows T of a block: all where the length is no multiple of BLOCK_ROWS."""
    return length if length % BLOCK_ROWS else BLOCK_ROWS


class JointSelfAttention(DisentangledSelfAttention):
    """Disentangled attention with one matmul for projections of the same input."""

    def join_projections(self, *projections: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the concatenated weights and biases, with those of queries scaled."""
        weights = [p.weight * self.scale if p is self.query_proj else p.weight for p in projections]
        biases = [p.bias * self.scale if p is self.query_proj else p.bias for p in projections]
        return torch.cat(weights), torch.cat(biases)

    def project_jointly(
        self, hidden_states: torch.Tensor, positions: RelativePositions | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return queries, keys and values [B, L, 3, H, D], and two tables [S, H, D].

        The tables are that of keys and that of queries. Queries and the query table are scaled.
        """
        weight, bias = self.join_projections(self.query_proj, self.key_proj, self.value_proj)
        split = (-1, (-1, self.num_heads, self.head_size))
        qkv = F.linear(hidden_states, weight, bias).unflatten(*split)
        if positions is None:
            return qkv, None, None
        if not self.share_att_key:
            tables = self.project_positions(positions.table)
            return qkv, *(None if table is None else table.transpose(0, 1) for table in tables)
        width = self.num_heads * self.head_size
        rows = slice(0 if "p2c" in self.terms else width, 2 * width if "c2p" in self.terms else width)
        table = self.position_dropout(positions.table)
        projected = F.linear(table, weight[rows], bias[rows]).unflatten(*split).unbind(1)
        key_table = projected[-1] if "c2p" in self.terms else None
        return qkv, key_table, projected[0] if "p2c" in self.terms else None


class SdpaSelfAttention(JointSelfAttention):
    """Disentangled attention through `scaled_dot_product_attention`."""

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return the context [B, L, H * D] of `hidden_states` [B, L, h], zero at padding."""
        qkv, key_table, query_table = self.project_jointly(hidden_states, positions)
        if positions is None:
            q, k, v = qkv.transpose(1, 3).unbind(2)
            bias = mask_keys(q.new_zeros(()), input_mask)
        else:
            windows = expand_tables(positions, key_table, query_table)
            q, k, v, bias = _PositionBias.apply(qkv, *windows, input_mask)
        return self.attend_with_bias(q, k, v, bias).masked_fill(~input_mask[:, :, None], 0)

    def gather_scores(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Gather columns of `scores` [B, H, rows, S] by slots int64 [(B,) rows, columns]."""
        return _Gather.apply(scores, expand_slots(slots, scores))

    def attend(self, q: torch.Tensor, keys: Keys) -> torch.Tensor:
        """Return the context [B, M, H * D] of scaled queries [B, H, M, D]."""
        if q.size(2) == 0:  # the bias would have no gradient, instead of zeros
            return super().attend(q, keys)
        bias = keys.position_to_content
        if keys.key_table is not None and keys.slots is not None:
            c2p = self.compute_content_to_position(q, keys.key_table, keys.slots)
            bias = c2p if bias is None else c2p + bias
        bias = mask_keys(q.new_zeros(()) if bias is None else bias, keys.input_mask)
        return self.attend_with_bias(q, keys.k, keys.v, bias)

    def attend_with_bias(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Return the context [B, M, H * D] of scaled queries [B, H, M, D]."""
        p = self.dropout.p if self.training else 0.0
        bias = bias.expand(-1, -1, q.size(2), -1)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        return context.transpose(1, 2).flatten(2)


def mask_keys(scores: torch.Tensor, input_mask: torch.Tensor) -> torch.Tensor:
    """Replace scores of padded keys by the lowest finite value.

    With minus infinity a row without real keys would be NaN. scores: broadcast to [B, H, M, L].
    """
    return scores.masked_fill(~input_mask[:, None, None], torch.finfo(scores.dtype).min)


class _Gather(torch.autograd.Function):
    """`x.gather(3, index)` that saves the shape of `x` instead of `x` for backward."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(3, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(3, index, grad), None


class _PositionBias(torch.autograd.Function):
    """Sum of the position terms at all positions, with padded keys masked.

    Inputs: qkv [B, L, 3, H, D]; windows of both tables [H, n * (L + T), D], or None; input_mask bool [B, L].
    Outputs: queries, keys and values [B, H, L, D], so that their gradients are added here; bias [B, H, L, L].
    Matmuls take the rows of all sequences at once, so that they sum gradients of the tables. The mask of keys
    is a part of the p2c matmul: more columns of its inputs. No scores are saved.
    """

    @staticmethod
    def forward(ctx, qkv, key_windows, query_windows, input_mask):
        q_rows = k_rows = None
        terms = []
        if key_windows is not None:
            q_rows = _view_blocks(qkv[:, :, 0]).contiguous()
            terms.append(_score_rows(q_rows, key_windows))
        if query_windows is not None:
            k_rows = _append_mask(_view_blocks(qkv[:, :, 1]), input_mask)
            query_windows = F.pad(query_windows, (0, MASK_COLUMNS), value=1.0)
            terms.append(_score_rows(k_rows, query_windows).permute(0, 1, 4, 5, 2, 3))
        bias = qkv.new_empty(terms[0].shape)
        _write_sum(bias, *terms)
        bias = bias.flatten(4).flatten(2, 3)
        if query_windows is None:
            bias.masked_fill_(~input_mask[:, None, None], MASKED_SCORE)
        ctx.save_for_backward(q_rows, k_rows, key_windows, query_windows)
        return *qkv.transpose(1, 3).unbind(2), bias

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v, grad):
        # Gradients of scores of padded keys are zero, because the probabilities are.
        q_rows, k_rows, key_windows, query_windows = ctx.saved_tensors
        grad_q_rows = grad_k_rows = grad_key_windows = grad_query_windows = None
        if key_windows is not None:
            grad_scores = grad.unflatten(2, (-1, q_rows.size(3))).permute(1, 2, 0, 3, 4)
            grad_q_rows, grad_key_windows = _differentiate_rows(grad_scores, q_rows, key_windows)
        if query_windows is not None:
            grad_scores = grad.unflatten(3, (-1, k_rows.size(3))).permute(1, 3, 0, 4, 2)
            grads = _differentiate_rows(grad_scores, k_rows, query_windows)
            grad_k_rows, grad_query_windows = (x[..., :-MASK_COLUMNS] for x in grads)
        batch, heads, length, size = grad_q.shape
        grad_qkv = grad.new_empty(batch, length, 3, heads, size)
        content_grads, position_grads = (grad_q, grad_k, grad_v), (grad_q_rows, grad_k_rows, None)
        for out, x, y in zip(grad_qkv.unbind(2), content_grads, position_grads, strict=True):
            _write_sum(_view_blocks(out), _view_blocks(x.transpose(1, 2)), y)
        return grad_qkv, grad_key_windows, grad_query_windows, None


def _write_sum(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """Write `x`, or `x + y`, to `out`, whatever its strides, in one pass."""
    if y is None:
        out.copy_(x)
    elif torch.compiler.is_compiling():  # fused; the compiler takes no `out` with gaps
        out.copy_(x + y)
    else:
        torch.add(x, y, out=out)


def _view_blocks(x_BLHD: torch.Tensor) -> torch.Tensor:
    """Return the view [H, n, B, T, D] of [B, L, H, D]."""
    return x_BLHD.unflatten(1, (-1, count_block_rows(x_BLHD.size(1)))).permute(3, 1, 0, 2, 4)


def _append_mask(k: torch.Tensor, input_mask: torch.Tensor) -> torch.Tensor:
    """Return `k` [H, n, B, T, D] with more columns, which mask padding.

    They add up to MASKED_SCORE there.
    """
    mask = torch.where(input_mask, 0.0, MASKED_SCORE / MASK_COLUMNS)
    mask = mask.unflatten(1, (-1, k.size(3))).transpose(0, 1)
    masked = k.new_empty(*k.shape[:4], k.size(4) + MASK_COLUMNS)
    masked[..., :-MASK_COLUMNS] = k
    masked[..., -MASK_COLUMNS:] = mask[:, :, :, None]
    return masked


def _merge_rows(x: torch.Tensor) -> torch.Tensor:
    """Return [H * n, B * T, ...] of [H, n, B, T, ...]."""
    return x.flatten(2, 3).flatten(0, 1)


def _score_rows(x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the view [B, H, n, T, n, T] of the scores of rows `x` [H, n, B, T, D]."""
    windows = windows.unflatten(1, (x.size(1), -1)).flatten(0, 1)
    scores = torch.bmm(_merge_rows(x), windows.transpose(1, 2)).view(*x.shape[:4], -1)
    return view_distances(scores[..., :-1]).permute(2, 0, 1, 3, 4).unflatten(4, x.shape[1:4:2])


def _differentiate_rows(
    grad: torch.Tensor, x: torch.Tensor, windows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of rows `x` [H, n, B, T, D] and of windows.

    They follow from those of scores [H, n, B, T, L].
    """
    scores = _merge_rows(spread_distances(grad))
    grad_x = torch.bmm(scores, windows.unflatten(1, (x.size(1), -1)).flatten(0, 1)).view(x.shape)
    return grad_x, torch.bmm(scores.transpose(1, 2), _merge_rows(x)).view(windows.shape)
