"""Arithmetic of the LM head on one chunk of logits, through kernels if available."""

import torch

from DeBERTa.model.losses import GROUP, ChunkOperations
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.linear import apply_affine, differentiate_affine


class CpuChunkOperations(ChunkOperations):
    """Chunk operations with matmuls in fast layouts and fused passes over the logits.

    Sums take one pass over the logits, and gradients another.
    """

    def compute_logits(
        self, x_ME: torch.Tensor, table_CE: torch.Tensor, bias_C: torch.Tensor
    ) -> torch.Tensor:
        """Return logits [M, C] in the dtype of `x_ME`."""
        return apply_affine(x_ME, table_CE, bias_C)

    def sum_exponentials(self, logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logit [M] and sums of exp(logit - largest) by group [M, S]."""
        kernel = library.find_kernel("sum_chunk", logits_MC)
        if kernel is None:
            return super().sum_exponentials(logits_MC)
        rows, tokens = logits_MC.shape
        largest_M = logits_MC.new_empty(rows, dtype=torch.float32)
        sums_MS = logits_MC.new_empty(rows, -(-tokens // GROUP), dtype=torch.float32)
        kernel(logits_MC.contiguous(), largest_M, sums_MS, rows, tokens, GROUP)
        return largest_M, sums_MS

    def differentiate_logits(
        self,
        logits_MC: torch.Tensor,
        shift_M: torch.Tensor,
        size_M: torch.Tensor,
        column_M: torch.Tensor,
        sign_M: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unsigned gradients of the logits, in place, and those of the bias [C]."""
        kernel = library.find_kernel("compute_chunk_gradients", logits_MC)
        if kernel is None:
            return super().differentiate_logits(logits_MC, shift_M, size_M, column_M, sign_M)
        rows, tokens = logits_MC.shape
        logits_MC, grad_bias_C = logits_MC.contiguous(), logits_MC.new_empty(tokens, dtype=torch.float32)
        kernel(logits_MC, shift_M, size_M, column_M.long(), sign_M, grad_bias_C, rows, tokens)
        return logits_MC, grad_bias_C

    def differentiate_inputs(
        self, grad_MC: torch.Tensor, x_ME: torch.Tensor, table_CE: torch.Tensor, out_CE: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of `x_ME`, and write that of the table to `out_CE`."""
        grad_x_ME, *_ = differentiate_affine(grad_MC, x_ME, table_CE, needs_bias=False, out=out_CE)
        assert grad_x_ME is not None
        return grad_x_ME
