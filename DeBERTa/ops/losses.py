"""Arithmetic of the LM head on a GPU.

Chunks are larger, and passes are compiled to one kernel each.
"""

import torch
from torch.nn import functional as F

from DeBERTa.model.losses import GROUP, ChunkOperations

GPU_CHUNK = 32768  # tokens: fewer launches; 32 x 512 tokens take 0.5 GB for the logits of a chunk


class CompiledChunkOperations(ChunkOperations):
    """Chunk operations whose passes over the logits are compiled.

    None stores a copy of the logits in float32.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__(chunk)
        for name in ("sum_exponentials", "differentiate_logits"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))  # for any number of rows

    def sum_exponentials(self, logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logit [M] and sums of exp(logit - largest) by group [M, S]."""
        largest_M = logits_MC.amax(1).float()
        exps_MC = (logits_MC.float() - largest_M[:, None]).exp()
        padded_MC = F.pad(exps_MC, (0, -logits_MC.size(1) % GROUP))
        return largest_M, padded_MC.unflatten(1, (-1, GROUP)).sum(2)

    def differentiate_logits(
        self,
        logits_MC: torch.Tensor,
        shift_M: torch.Tensor,
        size_M: torch.Tensor,
        column_M: torch.Tensor,
        sign_M: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unsigned gradients of the logits [M, C], and those of the bias [C]."""
        is_target_MC = torch.arange(logits_MC.size(1), device=logits_MC.device) == column_M[:, None]
        target_MC = torch.where(is_target_MC, size_M[:, None], 0.0)
        grad_MC = (logits_MC.float() - shift_M[:, None]).exp() - target_MC
        return grad_MC.to(logits_MC.dtype), (grad_MC * sign_M[:, None]).sum(0)
