"""Self-attention through the Triton kernels."""

import torch

from DeBERTa.model.attention import RelativePositions
from DeBERTa.ops.attention import SdpaSelfAttention
from DeBERTa.ops.triton.attention import attend, expand_table


class TritonSelfAttention(SdpaSelfAttention):
    """Disentangled attention by the Triton kernels for queries at all positions.

    Queries at selected positions (`attend`) use `SdpaSelfAttention`.
    """

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return the context [B, L, H * D] of `hidden_states` [B, L, h], zero at padding."""
        split = (-1, (self.num_heads, self.head_size))
        q = self.query_proj(hidden_states).unflatten(*split) * self.scale
        k, v = (
            self.key_proj(hidden_states).unflatten(*split),
            self.value_proj(hidden_states).unflatten(*split),
        )
        key_table = query_table = None
        if positions is not None:
            key_table, query_table = self.project_positions(positions.table)
            if key_table is not None:
                key_table = expand_table(key_table, positions.distance_slots, 1)
            if query_table is not None:
                query_table = expand_table(query_table, positions.distance_slots, -1)
        p = self.dropout.p if self.training else 0.0
        seed = torch.randint(2**62, (1,), device=q.device)
        context = attend(q, k, v, (key_table, query_table), input_mask, (p, seed))
        return context.flatten(2).masked_fill(~input_mask[:, :, None], 0)
