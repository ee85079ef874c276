"""Self-attention through the Triton kernels."""

import torch

from DeBERTa.model.attention import RelativePositions
from DeBERTa.ops.attention import SdpaSelfAttention
from DeBERTa.ops.distances import ExpandingEncoder, expand_tables
from DeBERTa.ops.triton.attention import attend, list_tile_distances


class TritonEncoder(ExpandingEncoder):
    """Encoder whose expanded tables have the rows that the kernels read."""

    def list_distances(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the distances row - column of the rows of an expanded table, int64 [2W]."""
        return list_tile_distances(length, self.config.head_size, device)


class TritonSelfAttention(SdpaSelfAttention):
    """Disentangled attention by the Triton kernels for queries at all positions.

    Queries at selected positions (`attend`) use `SdpaSelfAttention`.
    """

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return the context [B, L, H * D] of `hidden_states` [B, L, h], zero at padding."""
        qkv, key_table, query_table = self.project_jointly(hidden_states, positions)
        tables = expand_tables(positions, key_table, query_table)
        p = self.dropout.p if self.training else 0.0
        return self.run_kernels(qkv, tables, input_mask, p)

    @torch.compiler.disable  # a compiled layer is compiled around it, in two graphs
    def run_kernels(
        self,
        qkv: torch.Tensor,
        tables: tuple[torch.Tensor | None, torch.Tensor | None],
        input_mask: torch.Tensor,
        p: float,
    ) -> torch.Tensor:
        """Return the context [B, L, H * D].

        qkv: [B, L, 3, H, D]. tables: by distance, [H, 2W, D].
        """
        seed = torch.randint(2**62, (1,), device=qkv.device)
        return attend(qkv, tables, input_mask, (p, seed)).flatten(2)
