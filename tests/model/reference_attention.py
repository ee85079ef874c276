"""Disentangled attention as the paper's formula, pair by pair: slow, and independent of every path."""

import math

import torch

from DeBERTa.config import ModelConfig


def compute_slot(distance: int, config: ModelConfig) -> int:
    """Return the row of the relative-position table for a distance (query minus key), as published."""
    span, bucket = config.position_span, distance
    if config.position_buckets > 0:
        largest = config.max_distance - 1
        distance = max(-largest, min(largest, distance))
        mid = config.position_buckets // 2
        if abs(distance) <= mid:
            bucket = distance
        else:
            far = math.ceil(math.log(abs(distance) / mid) / math.log(largest / mid) * (mid - 1)) + mid
            bucket = int(math.copysign(far, distance))
    return max(0, min(2 * span - 1, bucket + span))


def compute_context(attention, query_states, hidden_states, input_mask, table, config, drop=None):
    """Return the context [B, L, H * D] of states [B, L, h], with the normalized table [S, h].

    `drop` [B, H, L, L], if given, multiplies the probabilities.
    """
    heads, size = attention.num_heads, attention.head_size

    def split(x):
        return x.unflatten(-1, (heads, size)).transpose(-3, -2)

    q = split(attention.query_proj(query_states))
    k, v = (split(project(hidden_states)) for project in (attention.key_proj, attention.value_proj))
    length = hidden_states.size(1)
    scores = q @ k.transpose(-1, -2)
    rows = {distance: compute_slot(distance, config) for distance in range(1 - length, length)}
    slots = torch.tensor([[rows[i - j] for j in range(length)] for i in range(length)])
    if "c2p" in attention.terms:
        keys = split((attention.key_proj if attention.share_att_key else attention.pos_key_proj)(table))
        scores = scores + torch.einsum("bhid,hijd->bhij", q, keys[:, slots])
    if "p2c" in attention.terms:
        queries = split(
            (attention.query_proj if attention.share_att_key else attention.pos_query_proj)(table)
        )
        scores = scores + torch.einsum("bhjd,hijd->bhij", k, queries[:, slots])
    scores = scores / math.sqrt(size * (1 + len(attention.terms)))
    pairs = (input_mask[:, :, None] & input_mask[:, None, :])[:, None]
    probs = torch.softmax(scores.masked_fill(~pairs, torch.finfo(scores.dtype).min), -1) * pairs
    return ((probs if drop is None else probs * drop) @ v).transpose(1, 2).flatten(2)
