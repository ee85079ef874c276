"""Chunked cross entropy over the vocabulary, without [M, V] logits.

Shapes: M masked positions, E embedding width, V vocabulary, C tokens of a chunk, N chunks, S groups of a
chunk, G tokens of a group.

The first pass over the vocabulary stores the largest logit of every chunk, and the sum of exponentials of
every group. Loss and accuracy follow from these. A sample picks its chunk, then its group by these sums, then
the token, for which only the logits of that group are recomputed. The backward pass recomputes the logits of
each chunk.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 8192  # tokens: some hundred rows of a chunk fit in a CPU's cache, and its matmuls are large enough
GROUP = 32  # tokens
SAMPLE_ROWS = 512  # sampled at a time: each gathers GROUP rows of the table


class MaskedLoss(NamedTuple):
    """Results at the masked positions in row-major order.

    loss: float32 [M]. correct: bool [M], whether no token scores above the target.
    samples: int64 [M], drawn from the distribution, or None.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    samples: torch.Tensor | None


class ChunkOperations:
    """The arithmetic on one chunk of the vocabulary, in plain PyTorch.

    chunk: tokens of a chunk, a multiple of GROUP.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk

    def compute_logits(
        self, x_ME: torch.Tensor, table_CE: torch.Tensor, bias_C: torch.Tensor
    ) -> torch.Tensor:
        """Return logits [M, C] in the dtype of `x_ME`."""
        return F.linear(x_ME, table_CE.to(x_ME.dtype), bias_C.to(x_ME.dtype))

    def sum_exponentials(self, logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logit [M] and sums of exp(logit - largest) by group [M, S]."""
        largest_M, column_M = logits_MC.max(1)
        probs_MC = torch.softmax(logits_MC, 1, dtype=torch.float32)
        largest_prob_M1 = probs_MC.gather(1, column_M[:, None])
        if logits_MC.size(1) % GROUP:
            probs_MC = F.pad(probs_MC, (0, -logits_MC.size(1) % GROUP))
        return largest_M.float(), probs_MC.unflatten(1, (-1, GROUP)).sum(2) / largest_prob_M1

    def differentiate_logits(
        self,
        logits_MC: torch.Tensor,
        shift_M: torch.Tensor,
        size_M: torch.Tensor,
        column_M: torch.Tensor,
        sign_M: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unsigned gradients of the logits [M, C], and those of the bias [C].

        shift_M: logarithm of the sum of exponentials, minus that of `size_M`.
        size_M: magnitude of the gradients of the loss.
        column_M: int64, the target's column, where it lies in this chunk.
        `logits_MC` may be overwritten.
        """
        column_M1, is_here_M = _clamp_columns(column_M, logits_MC.size(1))
        shifted_MC = torch.sub(logits_MC, shift_M[:, None])
        grad_MC = torch.exp(shifted_MC, out=logits_MC)
        # Not `grad - size` at the target: both are rounded, and may cancel.
        target_M1 = shifted_MC.gather(1, column_M1).exp() - size_M[:, None]
        other_M1 = grad_MC.gather(1, column_M1)
        grad_MC.scatter_(1, column_M1, torch.where(is_here_M[:, None], target_M1.to(grad_MC.dtype), other_M1))
        return grad_MC, sign_M.to(grad_MC.dtype) @ grad_MC

    def differentiate_inputs(
        self, grad_MC: torch.Tensor, x_ME: torch.Tensor, table_CE: torch.Tensor, out_CE: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of `x_ME`, and write that of the table to `out_CE`."""
        if out_CE.dtype == x_ME.dtype:
            torch.mm(grad_MC.t(), x_ME, out=out_CE)
        else:
            out_CE.copy_(grad_MC.t() @ x_ME)
        return grad_MC @ table_CE.to(grad_MC.dtype)


def compute_vocabulary_loss(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    targets_M: torch.Tensor,
    uniforms_M: torch.Tensor | None = None,
    operations: ChunkOperations | None = None,
) -> MaskedLoss:
    """Return the cross entropy of softmax(`x table^T + bias`) at int64 `targets_M`.

    `uniforms_M` in [0, 1), if given, draws one sample per row. Matmuls run in the autocast dtype, or that of
    `x_ME`; sums in float32.
    """
    device = x_ME.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x_ME = x_ME.to(torch.get_autocast_dtype(device))  # LayerNorm returns float32 under autocast on a GPU
    loss, correct, samples = _ChunkedCrossEntropy.apply(
        x_ME, table_VE, bias_V, targets_M, uniforms_M, operations or ChunkOperations()
    )
    return MaskedLoss(loss, correct, samples if uniforms_M is not None else None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ME, table_VE, bias_V, targets_M, uniforms_M, operations):
        target_logits_M, largest_NM, sums_NMS = _sum_chunks(x_ME, table_VE, bias_V, targets_M, operations)
        top_M = largest_NM.amax(0)
        weights_NM = (largest_NM - top_M).double().exp() * sums_NMS.sum(2)
        log_total_M = weights_NM.sum(0).log().float() + top_M
        samples = torch.empty_like(targets_M)
        if uniforms_M is not None:
            samples = _sample(x_ME, table_VE, bias_V, weights_NM, sums_NMS, uniforms_M, operations.chunk)
        correct = target_logits_M >= top_M
        ctx.save_for_backward(x_ME, table_VE, bias_V, targets_M, log_total_M)
        ctx.operations = operations
        ctx.mark_non_differentiable(correct, samples)
        return log_total_M - target_logits_M, correct, samples

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M, _correct, _samples):
        x_ME, table_VE, bias_V, targets_M, log_total_M = ctx.saved_tensors
        # |gradient| times the probability in one pass over the logits. Signs are applied to the rows of x.
        sign_M, size_M = grad_M.sign(), grad_M.abs()
        shift_M = log_total_M - size_M.log()
        signed_x_ME = x_ME * sign_M[:, None].to(x_ME.dtype)
        grad_x_ME = torch.zeros_like(x_ME, dtype=torch.float32)
        grad_table_VE, grad_bias_V = torch.empty_like(table_VE), torch.empty_like(bias_V)
        for first in range(0, len(table_VE), ctx.operations.chunk):
            tokens = slice(first, first + ctx.operations.chunk)
            table_CE = table_VE[tokens]
            logits_MC = ctx.operations.compute_logits(x_ME, table_CE, bias_V[tokens])
            grad_MC, grad_bias_V[tokens] = ctx.operations.differentiate_logits(
                logits_MC, shift_M, size_M, targets_M - first, sign_M
            )
            grad_x_ME += ctx.operations.differentiate_inputs(
                grad_MC, signed_x_ME, table_CE, grad_table_VE[tokens]
            )
        grad_x_ME = (grad_x_ME * sign_M[:, None]).to(x_ME.dtype)
        return grad_x_ME, grad_table_VE, grad_bias_V, None, None, None


def _sum_chunks(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    targets_M: torch.Tensor,
    operations: ChunkOperations,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return target logits [M], largest logits [N, M] and sums by group [N, M, S].

    The sums are of exponentials relative to the chunk's largest; token c of a chunk belongs to group c // G.
    """
    chunk = operations.chunk
    largest, sums = [], []
    target_logits_M = torch.zeros_like(targets_M, dtype=torch.float32)
    for first in range(0, len(table_VE), chunk):
        tokens = slice(first, first + chunk)
        logits_MC = operations.compute_logits(x_ME, table_VE[tokens], bias_V[tokens])
        column_M1, is_here_M = _clamp_columns(targets_M - first, logits_MC.size(1))
        found_M = logits_MC.gather(1, column_M1).squeeze(1).float()
        target_logits_M = torch.where(is_here_M, found_M, target_logits_M)
        largest_M, sums_MS = operations.sum_exponentials(logits_MC)
        largest.append(largest_M)
        sums.append(F.pad(sums_MS, (0, chunk // GROUP - sums_MS.size(1))))
    return target_logits_M, torch.stack(largest), torch.stack(sums)


def _clamp_columns(column_M: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns clamped to a chunk, and whether they lie in it.

    The columns are int64 [M, 1], the flags bool [M].
    """
    return column_M.clamp(0, tokens - 1)[:, None], (column_M >= 0) & (column_M < tokens)


def _sample(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    weights_NM: torch.Tensor,
    sums_NMS: torch.Tensor,
    uniforms_M: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Draw one token per row, int64 [M].

    First its chunk is drawn, then its group, then the token.
    """
    rows_M = torch.arange(len(x_ME), device=x_ME.device)
    chunk_M, rest_M = _pick(weights_NM.t(), uniforms_M.double())
    group_M, rest_M = _pick(sums_NMS[chunk_M, rows_M], rest_M)
    offsets_G = torch.arange(GROUP, device=x_ME.device)
    tokens_MG = (chunk_M * chunk + group_M * GROUP)[:, None] + offsets_G
    choices = [torch.empty_like(chunk_M[:0])]
    for rows_R in rows_M.split(SAMPLE_ROWS):
        tokens_RG = tokens_MG[rows_R].clamp(max=len(table_VE) - 1)
        rounded_RGE = table_VE[tokens_RG].to(x_ME.dtype).float()
        # Summed in float32: `@` may round.
        logits_RG = (rounded_RGE * x_ME[rows_R, None].float()).sum(2) + bias_V[tokens_RG]
        logits_RG = logits_RG.masked_fill(tokens_MG[rows_R] >= len(table_VE), float("-inf"))
        choices.append(_pick(torch.softmax(logits_RG, dim=1), rest_M[rows_R])[0])
    samples_M = tokens_MG.gather(1, torch.cat(choices)[:, None]).squeeze(1)
    return samples_M.clamp(max=len(table_VE) - 1)  # a row with NaN has no distribution


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a column of `weights` [M, K] per row.

    Returns the column and a new uniform number per row.
    """
    ends = weights.double().cumsum(1)
    points = uniforms * ends[:, -1]
    # Rounding can put a point at the very end, past the last column that has weight.
    chosen = torch.searchsorted(ends, points[:, None], right=True).clamp(max=ends.size(1) - 1)
    weight, end = weights.double().gather(1, chosen), ends.gather(1, chosen)
    return chosen.squeeze(1), ((points[:, None] - (end - weight)) / weight).squeeze(1).clamp(0, 1)
