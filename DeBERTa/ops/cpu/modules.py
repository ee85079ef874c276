"""CPU implementations of modules of model/.

`select_implementations` changes the class of the plain modules to these.
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa.model.attention import DisentangledSelfAttention, Keys, RelativePositions
from DeBERTa.model.encoder import AddNorm, Layer
from DeBERTa.ops.attention import JointSelfAttention
from DeBERTa.ops.cpu.attention import BlockedAttention
from DeBERTa.ops.cpu.dropout import add_dropout
from DeBERTa.ops.cpu.linear import FeedForward, apply_linear


class CpuDropout(nn.Dropout):
    """Dropout by the bits of ops/dropout.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` with elements dropped, in training only."""
        return add_dropout(None, x, self.p) if self.training and self.p else x


class CpuLinear(nn.Linear):
    """Linear map in bfloat16 with gradients of its parameters in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x weight^T + bias`."""
        return F.linear(x, self.weight) if self.bias is None else apply_linear(x, self.weight, self.bias)


class CpuAddNorm(AddNorm):
    """Dropout and the residual in one pass."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return [..., h] from `x` [..., width] and `residual` [..., h]."""
        return self.add(self.dense(x), residual)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Apply dropout, residual addition and LayerNorm to the linear map's output."""
        p = self.dropout.p if self.training else 0.0
        return self.LayerNorm(add_dropout(residual, x, p) if p else residual + x)


class CpuLayer(Layer):
    """Layer whose feed-forward network saves only its input for the backward pass."""

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., h] from [..., h]."""
        inner, outer = self.intermediate.dense, self.output.dense
        weights = (inner.weight, inner.bias, outer.weight, outer.bias)
        output = cast(CpuAddNorm, self.output)
        return output.add(FeedForward.apply(x, *weights, self.intermediate.activation), x)


class CpuSelfAttention(JointSelfAttention):
    """Attention with one matmul for queries, keys and values, sequence by sequence."""

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return the context [B, L, H * D] of `hidden_states` [B, L, h], zero at padding."""
        q, k, v = self.project(hidden_states, self.query_proj, self.key_proj, self.value_proj)
        key_table = query_table = None
        if positions is not None:
            key_table, query_table = self.project_positions(positions.table)
            key_table = _expand(key_table, positions.distance_slots)
            # Ordered from distance -(L - 1) up: see `view_distances`.
            query_table = _expand(query_table, positions.distance_slots.flip(0))
        p = self.dropout.p if self.training else 0.0
        return BlockedAttention.apply(q, k, v, key_table, query_table, input_mask, p).flatten(2)

    def project(self, x: torch.Tensor, *projections: nn.Linear) -> tuple[torch.Tensor, ...]:
        """Return [B, H, L, D] of `x` [B, L, h] per projection, with queries scaled."""
        shape = (len(projections), self.num_heads, self.head_size)
        joined = apply_linear(x, *self.join_projections(*projections)).unflatten(-1, shape)
        return joined.permute(2, 0, 3, 1, 4).contiguous().unbind()

    def project_queries(self, query_states: torch.Tensor) -> torch.Tensor:
        """Return scaled queries [B, H, M, D] of `query_states` [B, M, h]."""
        return self.project(query_states, self.query_proj)[0]

    def project_keys(
        self,
        hidden_states: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        query_positions: torch.Tensor | None = None,
    ) -> Keys:
        """Project keys, values and relative positions, contiguous for `bmm`."""
        keys = super().project_keys(hidden_states, input_mask, positions, query_positions)
        return keys._replace(k=keys.k.contiguous(), v=keys.v.contiguous())


def _expand(table_HSD: torch.Tensor | None, slots_W: torch.Tensor) -> torch.Tensor | None:
    """Return the row of each distance, contiguous [H, W, D], or None of None."""
    if table_HSD is None:
        return None
    return table_HSD.transpose(0, 1).index_select(0, slots_W).transpose(0, 1).contiguous()


SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {
    AddNorm: CpuAddNorm,
    DisentangledSelfAttention: CpuSelfAttention,
    Layer: CpuLayer,
    nn.Dropout: CpuDropout,
    nn.Linear: CpuLinear,
}
