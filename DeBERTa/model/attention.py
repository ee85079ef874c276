"""Disentangled self-attention (DeBERTa, section 3.1) in plain PyTorch.

Shapes: B batch, L keys, M queries, H heads, D head size, h hidden size.
S rows of the relative-position table: those of the distances that occur.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from DeBERTa.config import ModelConfig


def map_to_buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """Map signed distances (query minus key) to buckets, int64 of the same shape.

    With `buckets` > 0, distances up to `mid = buckets // 2` have a bucket each. Longer ones share buckets on
    a logarithmic scale that ends at `max_distance - 1`. Otherwise every distance is its own bucket.
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
    """Map signed distances to rows of the relative-position table.

    Returns int64 of the same shape, values in [0, 2 * span).
    """
    span = config.position_span
    buckets = map_to_buckets(distances, config.position_buckets, config.max_distance)
    return (buckets + span).clamp(0, 2 * span - 1)


class RelativePositions(NamedTuple):
    """Relative positions of sequences of one length.

    table: [S, h], the rows of the relative-position table that occur at this length.
    distance_slots: int64 [2L - 1], the row in `table` of each distance from L - 1 down to -(L - 1).
    slots: int64 [L, L], the row in `table` of query i and key j; delta(i, j) of the paper, in buckets.
    """

    table: torch.Tensor
    distance_slots: torch.Tensor
    slots: torch.Tensor


class Keys(NamedTuple):
    """Keys, values and relative positions that queries attend to.

    k, v: [B, H, L, D]. input_mask: bool [B, L].
    slots: int64 [L, L], or [B, M, L] for queries at selected positions.
    key_table: [H, S, D], the projected relative-position table.
    position_to_content: [B, H, M, L], scores of the p2c term, which do not depend on the queries' content.
    `slots` is None without relative attention, the last two are where their term is not in use.
    """

    k: torch.Tensor
    v: torch.Tensor
    input_mask: torch.Tensor
    slots: torch.Tensor | None
    key_table: torch.Tensor | None
    position_to_content: torch.Tensor | None


class DisentangledSelfAttention(nn.Module):
    """Attention by content, content to position (c2p), position to content (p2c).

    `score(i, j) = (q_i k_j + q_i K_R[slot(i, j)] + k_j Q_R[slot(i, j)]) / sqrt(D * (1 + terms))`, equation 4
    of the paper. Both position terms use `slot(i, j)`, as in the published code; the paper's p2c term reads
    delta(j, i).
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
        self.position_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.scale = 1 / math.sqrt(self.head_size * (1 + len(self.terms)))

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Split [..., L, H * D] into [..., H, L, D]."""
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(-3, -2)

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return the context [B, L, H * D] of `hidden_states` [B, L, h], zero at padding.

        `positions` is needed with relative attention only.
        """
        keys = self.project_keys(hidden_states, input_mask, positions)
        context = self.attend(self.project_queries(hidden_states), keys)
        return context.masked_fill(~input_mask[:, :, None], 0)

    def project_queries(self, query_states: torch.Tensor) -> torch.Tensor:
        """Return scaled queries [B, H, M, D] of `query_states` [B, M, h]."""
        return self.split_heads(self.query_proj(query_states)) * self.scale

    def project_keys(
        self,
        hidden_states: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        query_positions: torch.Tensor | None = None,
    ) -> Keys:
        """Project keys, values and relative positions.

        query_positions: int64 [B, M], where queries are at selected positions only.
        """
        k, v = (
            self.split_heads(self.key_proj(hidden_states)),
            self.split_heads(self.value_proj(hidden_states)),
        )
        if positions is None:
            return Keys(k, v, input_mask, None, None, None)
        slots = positions.slots if query_positions is None else positions.slots[query_positions]
        key_table, query_table = self.project_positions(positions.table)
        scores = None if query_table is None else self.compute_position_to_content(k, query_table, slots)
        return Keys(k, v, input_mask, slots, key_table, scores)

    def project_positions(self, table: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Project `table` [S, h] to position keys and scaled position queries.

        Both are [H, S, D], or None where the c2p or p2c term is not in use.
        """
        table = self.position_dropout(table)
        key_table = query_table = None
        if "c2p" in self.terms:
            key_table = self.split_heads((self.key_proj if self.share_att_key else self.pos_key_proj)(table))
        if "p2c" in self.terms:
            projection = self.query_proj if self.share_att_key else self.pos_query_proj
            query_table = self.split_heads(projection(table)) * self.scale
        return key_table, query_table

    def compute_content_to_position(
        self, q: torch.Tensor, key_table: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Return `q_i K_R[slot(i, j)]`, [B, H, M, L]."""
        return self.gather_scores(q @ key_table.transpose(1, 2), slots)

    def compute_position_to_content(
        self, k: torch.Tensor, query_table: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Return `k_j Q_R[slot(i, j)]`, [B, H, M, L]."""
        scores_BHLS = k @ query_table.transpose(1, 2)
        return self.gather_scores(scores_BHLS, slots.transpose(-2, -1)).transpose(2, 3)

    def gather_scores(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Gather columns of `scores` [B, H, rows, S] by slots int64 [(B,) rows, columns]."""
        return scores.gather(3, expand_slots(slots, scores))

    def attend(self, q: torch.Tensor, keys: Keys) -> torch.Tensor:
        """Return the context [B, M, H * D] of scaled queries [B, H, M, D]."""
        scores = q @ keys.k.transpose(2, 3)
        if keys.key_table is not None and keys.slots is not None:
            scores = scores + self.compute_content_to_position(q, keys.key_table, keys.slots)
        if keys.position_to_content is not None:
            scores = scores + keys.position_to_content
        scores = scores.masked_fill(~keys.input_mask[:, None, None], torch.finfo(scores.dtype).min)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return (self.dropout(probs) @ keys.v).transpose(1, 2).flatten(2)


def expand_slots(slots: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Expand `slots` to the batch and heads of `scores` [B, H, ...].

    slots: int64 [(B,) rows, columns]. Returns int64 [B, H, rows, columns].
    """
    if slots.dim() == 3:
        slots = slots[:, None]
    return slots.expand(*scores.shape[:2], *slots.shape[-2:])
