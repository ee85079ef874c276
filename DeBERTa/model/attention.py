"""Disentangled attention (DeBERTa, section 3.1).

Shapes: B batch, L keys, M queries, H heads, D head size, h hidden, S rows of the relative-position table,
W = 2L - 1 distances.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.model.backends import FlashLookup, eager_attention, flash_attention, sdpa_attention
from DeBERTa.model.blocked_attention import BlockedAttention, distance_view
from DeBERTa.model.dropout import Dropout
from DeBERTa.model.products import linear, linear_map


def map_to_buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of each signed distance (query minus key), int64 of the same shape.

    With `buckets` > 0, distances up to `mid = buckets // 2` keep a bucket each; further ones share buckets on a
    logarithmic scale that reaches its end at `max_distance - 1`. Otherwise every distance is its own bucket.
    """
    if buckets < 1:
        return distances
    distances = distances.clamp(-(max_distance - 1), max_distance - 1)
    mid = buckets // 2
    size = distances.abs().clamp(min=1).double()
    scale = math.log((max_distance - 1) / mid) if max_distance - 1 > mid else 1.0
    far = mid + torch.ceil(torch.log(size / mid) / scale * (mid - 1)).long()
    return torch.where(distances.abs() <= mid, distances, distances.sign() * far)


def map_to_slots(distances: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Row of the relative-position table for each distance: int64, values in [0, 2 * span)."""
    span = config.position_span
    buckets = map_to_buckets(distances, config.position_buckets, config.max_distance)
    return (buckets + span).clamp(0, 2 * span - 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, index):
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, x.shape
        return x.gather(dim, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(ctx.dim, index, grad), None, None


def gather(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`x.gather(dim, index)` without keeping `x` for the backward pass, which needs its shape alone."""
    return _Gather.apply(x, dim, index)


class RelativePositions(NamedTuple):
    """Relative positions of sequences of one length.

    `table` [S', h]: the rows of the table that can occur; `rows` int64 [W]: which of them belongs to each distance,
    from L - 1 down to -(L - 1). `lookup`: the same for the flash kernels, where these are used.
    """

    table: torch.Tensor
    rows: torch.Tensor
    lookup: FlashLookup | None = None


class Keys(NamedTuple):
    """What queries attend to: keys and values [B, H, L, D]; bool mask [B, L]; position keys and queries [H, W, D]."""

    k: torch.Tensor
    v: torch.Tensor
    input_mask: torch.Tensor
    key_table: torch.Tensor | None
    query_table: torch.Tensor | None


class DisentangledSelfAttention(nn.Module):
    """Attention scores from content, and from content to position (c2p) and position to content (p2c).

    `score(i, j) = (q_i k_j + q_i K_R[slot] + k_j Q_R[slot]) / sqrt(D * terms)`, equation 4 of the paper, with one
    `slot(i, j)` for both position terms, as in the published code. `backend` is how it is computed: see backends.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        width = self.num_heads * self.head_size
        self.query_proj = nn.Linear(config.hidden_size, width)
        self.key_proj = nn.Linear(config.hidden_size, width)
        self.value_proj = nn.Linear(config.hidden_size, width)
        self.terms = config.position_terms
        self.share_att_key = config.share_att_key
        if self.terms and not self.share_att_key:
            if "c2p" in self.terms:
                self.pos_key_proj = nn.Linear(config.hidden_size, width)
            if "p2c" in self.terms:
                self.pos_query_proj = nn.Linear(config.hidden_size, width)
        self.position_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.scale = 1 / math.sqrt(self.head_size * (1 + len(self.terms)))
        self.backend = "auto"

    def project(self, x: torch.Tensor, *projections: nn.Linear) -> tuple[torch.Tensor, ...]:
        """[B, H, L, D] of `x` [B, L, h] for each of this module's projections, in one product; queries are scaled."""
        scales = [self.scale if projection is self.query_proj else 1.0 for projection in projections]
        weight = torch.cat([p.weight * scale for p, scale in zip(projections, scales, strict=True)])
        bias = torch.cat([p.bias * scale for p, scale in zip(projections, scales, strict=True)])
        joined = linear_map(x, weight, bias).unflatten(-1, (len(projections), self.num_heads, self.head_size))
        return joined.permute(2, 0, 3, 1, 4).contiguous().unbind()

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., L, H * D] -> [..., H, L, D]"""
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(-3, -2).contiguous()

    def with_positions(
        self, k: torch.Tensor, v: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> Keys:
        """Everything but the queries, from keys and values [B, H, L, D] and `input_mask` bool [B, L].

        `positions` is needed only with relative attention; its table is projected once for all sequences.
        """
        key_table, query_table = self.project_positions(positions)
        if key_table is not None:
            key_table = self.split_heads(key_table.index_select(0, positions.rows))
        if query_table is not None:
            query_table = self.split_heads(
                query_table.index_select(0, positions.rows.flip(0))
            )  # see `distance_view`
        return Keys(k, v, input_mask, key_table, query_table)

    def project_positions(
        self, positions: RelativePositions | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Position keys (c2p) and scaled position queries (p2c) of the rows, [S', H * D]; None where not in use."""
        key_table = query_table = None
        if self.terms:
            table = self.position_dropout(positions.table)
            if "c2p" in self.terms:
                key_table = linear(table, self.key_proj if self.share_att_key else self.pos_key_proj)
            if "p2c" in self.terms:
                query_table = (
                    linear(table, self.query_proj if self.share_att_key else self.pos_query_proj) * self.scale
                )
        return key_table, query_table

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Context [B, L, H * D] of every position of `hidden_states` [B, L, h]; zero at padding."""
        q, k, v = self.project(hidden_states, self.query_proj, self.key_proj, self.value_proj)
        if self.backend == "flash":
            tables = (t if t is None else self.split_heads(t) for t in self.project_positions(positions))
            p = self.dropout.p if self.training else 0.0
            return flash_attention(q, k, v, *tables, positions.lookup, input_mask, p)
        return self.attend(q, self.with_positions(k, v, input_mask, positions))

    def attend(self, q: torch.Tensor, keys: Keys) -> torch.Tensor:
        """Context [B, L, H * D] of a query [B, H, L, D] at every position; zero at padding."""
        # The compiler cannot look into the blocked path, and fuses the plain one itself.
        if self.backend == "auto" and q.device.type == "cpu" and not torch.compiler.is_compiling():
            p = self.dropout.p if self.training else 0.0
            context = BlockedAttention.apply(
                q, keys.k, keys.v, keys.key_table, keys.query_table, keys.input_mask, p
            )
            return context.flatten(2)
        context = self._attend(q, keys, self.position_scores(q, keys))
        context = context.masked_fill(~keys.input_mask[:, None, :, None], 0)
        return context.transpose(1, 2).flatten(2)

    def position_scores(self, q: torch.Tensor, keys: Keys) -> list[torch.Tensor]:
        """The position terms in use, each [B, H, L, L], for queries `q` [B, H, L, D] at all positions."""
        terms = []
        if keys.key_table is not None:
            terms.append(distance_view(q @ keys.key_table.transpose(1, 2)))
        if keys.query_table is not None:
            terms.append(distance_view(keys.k @ keys.query_table.transpose(1, 2)).transpose(2, 3))
        return terms

    def selected_position_keys(self, keys: Keys, at: torch.Tensor) -> torch.Tensor | None:
        """The p2c term for queries at positions `at` int64 [B, M] only, [B, H, M, L]: it does not depend on queries."""
        if keys.query_table is None:
            return None
        every = distance_view(keys.k @ keys.query_table.transpose(1, 2)).transpose(2, 3)
        return gather(every, 2, at[:, None, :, None].expand(-1, every.size(1), -1, every.size(3)))

    def selected(
        self, query_states: torch.Tensor, at: torch.Tensor, keys: Keys, position_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Context [B, M, H * D] of `query_states` [B, M, h] at positions `at` int64 [B, M], all of them real tokens."""
        (q,) = self.project(query_states, self.query_proj)
        terms = [] if position_keys is None else [position_keys]
        if keys.key_table is not None:
            length = keys.k.size(2)
            product = q @ keys.key_table.transpose(1, 2)
            columns = (length - 1 - at)[:, :, None] + torch.arange(length, device=at.device)
            terms.append(gather(product, 3, columns[:, None].expand(-1, q.size(1), -1, -1)))
        return self._attend(q, keys, terms).transpose(1, 2).flatten(2)

    def _attend(self, q: torch.Tensor, keys: Keys, terms: list[torch.Tensor]) -> torch.Tensor:
        """Context [B, H, M, D] of queries [B, H, M, D], whatever they are, with position scores `terms`."""
        plain = self.backend == "eager" or (self.backend == "auto" and q.device.type == "cpu")
        attention = eager_attention if plain else sdpa_attention
        return attention(q, keys.k, keys.v, terms, keys.input_mask, self.dropout)
