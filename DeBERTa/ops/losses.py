"""Arithmetic of the LM head on a GPU: larger chunks, and passes compiled to one kernel each."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from DeBERTa.model.heads import LMHead
from DeBERTa.model.losses import GROUP, ChunkOperations

Pair = tuple[torch.Tensor, torch.Tensor]
GPU_CHUNK = 32768  # tokens: fewer launches; 32 x 512 tokens take 0.5 GB for the logits of a chunk


class LargeChunkLMHead(LMHead):
    """LM head that launches fewer operations."""

    operations = ChunkOperations(GPU_CHUNK)


@functools.cache
def compile_once(function: Callable[..., Pair]) -> Callable[..., Pair]:
    """Return `function` compiled for any number of rows.

    Not before it is needed: the compiler takes seconds to load.
    """
    return torch.compile(function, dynamic=True)


def _sum_exponentials(logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest_M = logits_MC.amax(1).float()
    exps_MC = (logits_MC.float() - largest_M[:, None]).exp()
    padded_MC = F.pad(exps_MC, (0, -logits_MC.size(1) % GROUP))
    return largest_M, padded_MC.unflatten(1, (-1, GROUP)).sum(2)


def _differentiate_logits(
    logits_MC: torch.Tensor,
    shift_M: torch.Tensor,
    size_M: torch.Tensor,
    column_M: torch.Tensor,
    sign_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    is_target_MC = torch.arange(logits_MC.size(1), device=logits_MC.device) == column_M[:, None]
    grad_MC = (logits_MC.float() - shift_M[:, None]).exp() - torch.where(is_target_MC, size_M[:, None], 0.0)
    return grad_MC.to(logits_MC.dtype), (grad_MC * sign_M[:, None]).sum(0)


class CompiledChunkOperations(ChunkOperations):
    """Chunk operations whose passes over the logits are compiled: none stores a copy of them in float32."""

    def sum_exponentials(self, logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logit [M] and sums of exp(logit - largest) by group [M, S]."""
        return compile_once(_sum_exponentials)(logits_MC)

    def differentiate_logits(
        self,
        logits_MC: torch.Tensor,
        shift_M: torch.Tensor,
        size_M: torch.Tensor,
        column_M: torch.Tensor,
        sign_M: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unsigned gradients of the logits [M, C], and those of the bias [C]."""
        return compile_once(_differentiate_logits)(logits_MC, shift_M, size_M, column_M, sign_M)


class CompiledLMHead(LMHead):
    """LM head whose passes over a chunk of logits are compiled."""

    operations = CompiledChunkOperations(GPU_CHUNK)
