"""Softmax over the vocabulary in chunks: loss, accuracy, samples and gradients without [M, V] logits.

Shapes: M masked positions, E embedding width, V vocabulary, C words of a chunk, N chunks, S groups of a chunk, G words
of a group.

The first pass over the vocabulary keeps the maximum of every chunk, and the sum of exponentials of every group: words
of a chunk that are S apart, so that the sums are sums of columns. Loss and accuracy follow from these. A sample picks
its chunk, then its group by these sums, then the word, for which only the logits of that group are computed again. The
backward pass computes each chunk's logits again, for the gradients.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from DeBERTa.model import kernels
from DeBERTa.model.products import affine, affine_gradients

CHUNK = 8192  # words: a chunk of some hundred rows stays in the cache, and the products are large enough to be fast
GROUP = 32  # words
SAMPLE_ROWS = 512  # sampled at once: they gather GROUP rows of the table each


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
    `chunk` must be a multiple of GROUP.
    """
    loss, correct, samples = _ChunkedCrossEntropy.apply(x_ME, table_VE, bias_V, targets_M, uniforms_M, chunk)
    return MaskedLoss(loss, correct, samples if uniforms_M is not None else None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ME, table_VE, bias_V, targets_M, uniforms_M, chunk):
        largest, sums = [], []
        target_logits = torch.zeros_like(targets_M, dtype=torch.float32)
        for first in range(0, len(table_VE), chunk):
            words = slice(first, first + chunk)
            logits_MC = affine(x_ME, table_VE[words], bias_V[words])
            column, here = _columns(targets_M - first, logits_MC.size(1))
            target_logits = torch.where(here, logits_MC.gather(1, column).squeeze(1).float(), target_logits)
            largest_M, sums_MS = _chunk_sums(logits_MC, chunk // GROUP)
            largest.append(largest_M)
            sums.append(sums_MS)
        largest_NM, sums_NMS = torch.stack(largest), torch.stack(sums)
        top_M = largest_NM.amax(0)
        scales_NM = (largest_NM - top_M).double().exp()
        weights_NM = scales_NM * sums_NMS.sum(2)
        log_total_M = weights_NM.sum(0).log().float() + top_M
        samples = torch.empty_like(targets_M)
        if uniforms_M is not None:
            samples = _sample(x_ME, table_VE, bias_V, weights_NM, sums_NMS, uniforms_M, chunk)
        correct = target_logits >= top_M
        ctx.save_for_backward(x_ME, table_VE, bias_V, targets_M, log_total_M)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(correct, samples)
        return log_total_M - target_logits, correct, samples

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M, _correct, _samples):
        x_ME, table_VE, bias_V, targets_M, log_total_M = ctx.saved_tensors
        # |gradient| times the probability in one pass over the logits; the signs go to the rows of x.
        sign_M, size_M = grad_M.sign(), grad_M.abs()
        shift_M = log_total_M - size_M.log()
        signed_x_ME = x_ME * sign_M[:, None].to(x_ME.dtype)
        dx_ME = torch.zeros_like(x_ME, dtype=torch.float32)
        dtable, dbias = torch.empty_like(table_VE), torch.empty_like(bias_V)
        for first in range(0, len(table_VE), ctx.chunk):
            words = slice(first, first + ctx.chunk)
            logits_MC = affine(x_ME, table_VE[words], bias_V[words])
            dlogits_MC, dbias[words] = _chunk_gradients(logits_MC, shift_M, size_M, targets_M - first, sign_M)
            part_ME, *_ = affine_gradients(dlogits_MC, signed_x_ME, table_VE[words], bias=False, out=dtable[words])
            dx_ME += part_ME
        return (dx_ME * sign_M[:, None]).to(x_ME.dtype), dtable, dbias, None, None, None


def _chunk_sums(logits_MC: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, float32 [M], and the sums of exponentials relative to it of `groups` groups, [M,
    S]: word c belongs to group c % S."""
    rows, words = logits_MC.shape
    kernel = kernels.find("chunk_sums", logits_MC)
    if kernel is not None:
        largest_M, sums_MS = (logits_MC.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, groups)))
        kernel(logits_MC.contiguous(), largest_M, sums_MS, rows, words, groups)
        return largest_M, sums_MS
    largest_M = logits_MC.amax(1).float()
    exps_MC = logits_MC.float().sub_(largest_M[:, None]).exp_()
    return largest_M, F.pad(exps_MC, (0, -words % groups)).unflatten(1, (-1, groups)).sum(1)


def _chunk_gradients(
    logits_MC: torch.Tensor, shift_M: torch.Tensor, size_M: torch.Tensor, column_M: torch.Tensor, sign_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the logits but for the rows' signs, [M, C], in the logits' memory if that saves time; and those of
    the biases, float32 [C]. Target words are in `column_M` int64 [M], where that is a column."""
    rows, words = logits_MC.shape
    kernel = kernels.find("chunk_gradients", logits_MC)
    if kernel is not None:
        column_M = column_M.long()
        logits_MC, dbias_C = logits_MC.contiguous(), logits_MC.new_empty(words, dtype=torch.float32)
        kernel(logits_MC, shift_M, size_M, column_M, sign_M, dbias_C, rows, words)
        return logits_MC, dbias_C
    dlogits_MC = logits_MC.float().sub_(shift_M[:, None]).exp_()
    column_M1, here_M = _columns(column_M, words)
    dlogits_MC.scatter_add_(1, column_M1, torch.where(here_M, -size_M, 0.0)[:, None])
    return dlogits_MC.to(logits_MC.dtype), sign_M @ dlogits_MC


def _columns(column_M: torch.Tensor, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns clamped to those of a chunk, int64 [M, 1], and whether they were in it, bool [M]."""
    return column_M.clamp(0, words - 1)[:, None], (column_M >= 0) & (column_M < words)


def _sample(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    weights_NM: torch.Tensor,
    sums_NMS: torch.Tensor,
    uniforms_M: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """One word a row, int64 [M]: chunk, group and word, each with what the uniform number has left."""
    chunk_M, rest_M = _pick(weights_NM.t(), uniforms_M.double())
    group_M, rest_M = _pick(sums_NMS[chunk_M, torch.arange(len(x_ME), device=x_ME.device)], rest_M)
    spaced_G = torch.arange(GROUP, device=x_ME.device) * (chunk // GROUP)
    words_MG = (chunk_M * chunk + group_M)[:, None] + spaced_G
    choices = []
    for rows in torch.arange(len(x_ME), device=x_ME.device).split(SAMPLE_ROWS):
        words_RG = words_MG[rows].clamp(max=len(table_VE) - 1)
        logits_RG = (table_VE[words_RG].to(x_ME.dtype) @ x_ME[rows][:, :, None]).squeeze(2).float() + bias_V[words_RG]
        weights_RG = torch.softmax(logits_RG.masked_fill(words_MG[rows] >= len(table_VE), float("-inf")), dim=1)
        choices.append(_pick(weights_RG, rest_M[rows])[0])
    return words_MG.gather(1, torch.cat(choices)[:, None]).squeeze(1) if choices else torch.empty_like(chunk_M)


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A column of `weights` [M, K] for each row, int64 [M], and where in it the number fell: uniform again, [M]."""
    ends = weights.double().cumsum(1)
    points = uniforms * ends[:, -1]
    # Rounding can put a point at the very end, past the last column that has weight.
    chosen = torch.searchsorted(ends, points[:, None], right=True).clamp(max=ends.size(1) - 1)
    weight, end = weights.double().gather(1, chosen), ends.gather(1, chosen)
    return chosen.squeeze(1), ((points[:, None] - (end - weight)) / weight).squeeze(1).clamp(0, 1)
