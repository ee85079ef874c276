"""Disentangled attention (DeBERTa, section 3.1).

Shapes: B batch, L keys, Q queries, H heads, D head size, h hidden, S rows of the relative-position table.
"""

import math

import torch
from torch import nn

from DeBERTa.config import ModelConfig


def relative_buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
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


def relative_slots(length: int, config: ModelConfig, device: torch.device | None = None) -> torch.Tensor:
    """Row of the relative-position table for each (query, key) pair: int64 [L, L], values in [0, 2 * span)."""
    positions = torch.arange(length, device=device)
    buckets = relative_buckets(positions[:, None] - positions, config.position_buckets, config.max_distance)
    span = config.position_span
    return (buckets + span).clamp(0, 2 * span - 1)


class DisentangledSelfAttention(nn.Module):
    """Attention scores from content, and from content to position (c2p) and position to content (p2c).

    `score(i, j) = (q_i k_j + q_i K_R[slot] + k_j Q_R[slot]) / sqrt(D * terms)`, equation 4 of the paper, with one
    `slot(i, j)` for both position terms, as in the published code.
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

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., L, H * D] -> [..., H, L, D]"""
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(-3, -2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor,
        input_mask: torch.Tensor,
        rel_embeddings: torch.Tensor | None,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """Context [B, L, H * D] of `query_states` [B, L, h] over keys and values from `hidden_states` [B, L, h].

        `input_mask` is bool [B, L], true at real tokens; a padded query gets a zero context. `rel_embeddings` [S, h]
        and `slots` int64 [L, L] are needed only with relative attention.
        """
        q_BHLD = self.split_heads(self.query_proj(query_states))
        k_BHLD = self.split_heads(self.key_proj(hidden_states))
        v_BHLD = self.split_heads(self.value_proj(hidden_states))
        scale = 1 / math.sqrt(self.head_size * (1 + len(self.terms)))
        scores_BHLL = (q_BHLD * scale) @ k_BHLD.transpose(-1, -2)
        if self.terms:
            scores_BHLL = scores_BHLL + self._position_scores(q_BHLD, k_BHLD, rel_embeddings, slots) * scale

        pairs_B1LL = (input_mask[:, :, None] & input_mask[:, None, :]).unsqueeze(1)
        scores_BHLL = scores_BHLL.masked_fill(~pairs_B1LL, torch.finfo(scores_BHLL.dtype).min)
        probs_BHLL = torch.softmax(scores_BHLL, dim=-1, dtype=torch.float32).masked_fill(~pairs_B1LL, 0)
        probs_BHLL = self.dropout(probs_BHLL.to(v_BHLD.dtype))
        return (probs_BHLL @ v_BHLD).transpose(1, 2).flatten(2)

    def _position_scores(
        self, q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, rel_embeddings: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the position terms in use, unscaled: [B, H, L, L]."""
        table = self.position_dropout(rel_embeddings)
        index = slots.expand(*q_BHLD.shape[:2], -1, -1)
        scores = []
        if "c2p" in self.terms:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            key_HSD = self.split_heads(project(table))
            scores.append((q_BHLD @ key_HSD.transpose(-1, -2)).gather(-1, index))
        if "p2c" in self.terms:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            query_HSD = self.split_heads(project(table))
            by_key = (k_BHLD @ query_HSD.transpose(-1, -2)).gather(-1, index.transpose(-1, -2))
            scores.append(by_key.transpose(-1, -2))
        return sum(scores)
