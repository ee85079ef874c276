"""Softmax over the vocabulary in chunks: loss, accuracy, samples and gradients without [M, V] logits.

Shapes: M masked positions, E embedding width, V vocabulary, C words of a chunk, N chunks.

The first pass over the vocabulary keeps the maximum and the sum of exponentials of every chunk. Loss and accuracy
follow from these. A sample first picks its chunk by these sums, then the word within it, for which only the rows that
fell into a chunk are computed again. The backward pass computes each chunk's logits again, for the gradients.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

CHUNK = 8192  # words: a chunk of some hundred rows stays in the cache, and the products are large enough to be fast


class MaskedLoss(NamedTuple):
    """At the masked positions in row-major order: `loss` float32 [M]; `correct` bool [M], whether no word scores above
    the target; `samples` int64 [M], drawn from the distribution, or None."""

    loss: torch.Tensor
    correct: torch.Tensor
    samples: torch.Tensor | None


def vocabulary_loss(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    targets_M: torch.Tensor,
    uniforms_M: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> MaskedLoss:
    """Cross entropy of softmax(`x_ME table_VE^T + bias_V`) at int64 `targets_M`.

    `uniforms_M` in [0, 1), if given, draws one sample a row. Products run in the type of `x_ME`, sums in float32.
    """
    loss, correct, samples = _ChunkedCrossEntropy.apply(x_ME, table_VE, bias_V, targets_M, uniforms_M, chunk)
    return MaskedLoss(loss, correct, samples if uniforms_M is not None else None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ME, table_VE, bias_V, targets_M, uniforms_M, chunk):
        table, bias = table_VE.to(x_ME.dtype), bias_V.to(x_ME.dtype)
        largest, sums = [], []
        target_logits = torch.zeros_like(targets_M, dtype=torch.float32)
        for first in range(0, len(table), chunk):
            logits_MC = F.linear(x_ME, table[first : first + chunk], bias[first : first + chunk]).float()
            column = targets_M - first
            here = (column >= 0) & (column < logits_MC.size(1))
            found = logits_MC.gather(1, column.clamp(0, logits_MC.size(1) - 1)[:, None]).squeeze(1)
            target_logits = torch.where(here, found, target_logits)
            largest.append(logits_MC.amax(1))
            sums.append(logits_MC.sub_(largest[-1][:, None]).exp_().sum(1))
        largest_NM, sums_NM = torch.stack(largest), torch.stack(sums)
        top_M = largest_NM.amax(0)
        weights_NM = (largest_NM - top_M).exp().double() * sums_NM
        log_total_M = weights_NM.sum(0).log().float() + top_M
        samples = torch.empty_like(targets_M)
        if uniforms_M is not None:
            samples = _sample(x_ME, table, bias, weights_NM, top_M, uniforms_M, chunk)
        correct = target_logits >= top_M
        ctx.save_for_backward(x_ME, table, bias, targets_M, log_total_M)
        ctx.chunk, ctx.types = chunk, (table_VE.dtype, bias_V.dtype)
        ctx.mark_non_differentiable(correct, samples)
        return log_total_M - target_logits, correct, samples

    @staticmethod
    def backward(ctx, grad_M, _correct, _samples):
        x_ME, table, bias, targets_M, log_total_M = ctx.saved_tensors
        dx_ME = torch.zeros_like(x_ME, dtype=torch.float32)
        dtable = torch.empty(table.shape, dtype=ctx.types[0], device=table.device)
        dbias = torch.empty(bias.shape, dtype=ctx.types[1], device=bias.device)
        for first in range(0, len(table), ctx.chunk):
            words = slice(first, first + ctx.chunk)
            probs_MC = F.linear(x_ME, table[words], bias[words]).float()
            probs_MC.sub_(log_total_M[:, None]).exp_().mul_(grad_M[:, None])
            column = targets_M - first
            here = (column >= 0) & (column < probs_MC.size(1))
            index = column.clamp(0, probs_MC.size(1) - 1)[:, None]
            probs_MC.scatter_add_(1, index, torch.where(here, -grad_M, 0.0)[:, None])
            dbias[words] = probs_MC.sum(0)
            probs_MC = probs_MC.to(x_ME.dtype)
            dx_ME += probs_MC @ table[words]
            dtable[words] = probs_MC.t() @ x_ME
        return dx_ME.to(x_ME.dtype), dtable, dbias, None, None, None


def _sample(
    x_ME: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor,
    weights_NM: torch.Tensor,
    top_M: torch.Tensor,
    uniforms_M: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """One word a row, int64 [M]: its chunk by the chunks' total weights, then the word within the chunk."""
    ends_MN = weights_NM.t().cumsum(1)
    points_M = uniforms_M.double() * ends_MN[:, -1]
    chosen_M = torch.searchsorted(ends_MN, points_M[:, None], right=True).squeeze(1).clamp(max=len(weights_NM) - 1)
    points_M = points_M - (ends_MN - weights_NM.t()).gather(1, chosen_M[:, None]).squeeze(1)
    samples = torch.empty_like(chosen_M)
    for number in range(len(weights_NM)):
        rows = torch.nonzero(chosen_M == number).squeeze(1)
        if not len(rows):
            continue
        words = slice(number * chunk, (number + 1) * chunk)
        logits = F.linear(x_ME[rows], table[words], bias[words]).float()
        cumulative = logits.sub_(top_M[rows, None]).exp_().cumsum(1)
        within = torch.searchsorted(cumulative, points_M[rows, None].float(), right=True).squeeze(1)
        samples[rows] = number * chunk + within.clamp(max=cumulative.size(1) - 1)
    return samples
