"""Softmax over the vocabulary in chunks: loss, accuracy, samples and gradients without [M, V] logits.

Shapes: M masked positions, E embedding width, V vocabulary, C words of a chunk, N chunks, S groups of a chunk, G words
of a group.

The first pass over the vocabulary keeps the largest logit of every chunk, and the sum of exponentials of every group.
Loss and accuracy follow from these. A sample picks its chunk, then its group by these sums, then the word, for which
only the logits of that group are computed again. The backward pass computes each chunk's logits again, for the
gradients.

In bfloat16 on processors with AMX two kernels of vocabulary.cpp make these two passes, with logits in float32 that
never leave the core's cache.
"""

import math
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
        if _tiled("vocabulary_sums", x_ME, table_VE, bias_V, targets_M):
            target_logits, largest_NM, sums_NMS = _tiled_sums(x_ME, table_VE, bias_V, targets_M, chunk)
        else:
            target_logits, largest_NM, sums_NMS = _sums(x_ME, table_VE, bias_V, targets_M, chunk)
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
        if _tiled("vocabulary_gradients", x_ME, table_VE, bias_V, targets_M):
            return *_tiled_gradients(x_ME, table_VE, bias_V, targets_M, log_total_M, grad_M), None, None, None
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
            part_ME, *_ = affine_gradients(
                dlogits_MC, signed_x_ME, table_VE[words], bias=False, out=dtable[words]
            )
            dx_ME += part_ME
        return (dx_ME * sign_M[:, None]).to(x_ME.dtype), dtable, dbias, None, None, None


def _tiled(
    name: str, x_ME: torch.Tensor, table_VE: torch.Tensor, bias_V: torch.Tensor, targets_M: torch.Tensor
) -> bool:
    """Whether a kernel of vocabulary.cpp can do it. What does not fit is left to PyTorch's operations."""
    (rows, width), words = x_ME.shape, len(table_VE)
    shapes = table_VE.shape == (words, width) and bias_V.shape == (words,) and targets_M.shape == (rows,)
    fit = shapes and rows > 0 and width % 32 == 0 and table_VE.is_contiguous() and bias_V.is_contiguous()
    return fit and bias_V.dtype == table_VE.dtype and kernels.find(name, x_ME, table_VE) is not None


def _padded(x_ME: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Filled up to a multiple of 32 positions, without a target."""
    missing = -len(x_ME) % 32
    return F.pad(x_ME, (0, 0, 0, missing)).contiguous(), F.pad(targets_M.long(), (0, missing), value=-1)


def _tiled_sums(
    x_ME: torch.Tensor, table_VE: torch.Tensor, bias_V: torch.Tensor, targets_M: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_sums`."""
    rows, words = len(x_ME), len(table_VE)
    x_ME, targets_M = _padded(x_ME, targets_M)
    chunks = -(-words // chunk)
    shapes = ((len(x_ME),), (chunks, len(x_ME)), (chunks, chunk // GROUP, len(x_ME)))
    target_logits, largest_NM, sums_NSM = out = [table_VE.new_zeros(shape) for shape in shapes]
    kernel = kernels.find("vocabulary_sums", x_ME, table_VE)
    kernel(x_ME, table_VE, bias_V, targets_M, *out, *x_ME.shape, words, chunk)
    return target_logits[:rows], largest_NM[:, :rows], sums_NSM[:, :, :rows].transpose(1, 2)


def _tiled_gradients(
    x_ME: torch.Tensor,
    table_VE: torch.Tensor,
    bias_V: torch.Tensor,
    targets_M: torch.Tensor,
    log_total_M: torch.Tensor,
    grad_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, table and bias."""
    rows, kind = len(x_ME), x_ME.dtype
    x_ME, targets_M = _padded(x_ME, targets_M)
    missing = len(x_ME) - rows
    log_total_M, grad_M = (
        F.pad(log_total_M, (0, missing), value=math.inf),
        F.pad(grad_M.float(), (0, missing)),
    )
    dx_ME, dtable, dbias = out = [torch.empty_like(t, dtype=torch.float32) for t in (x_ME, table_VE, bias_V)]
    kernel = kernels.find("vocabulary_gradients", x_ME, table_VE)
    kernel(x_ME, table_VE, bias_V, targets_M, log_total_M, grad_M, *out, *x_ME.shape, len(table_VE))
    return dx_ME[:rows].to(kind), dtable, dbias


def _sums(
    x_ME: torch.Tensor, table_VE: torch.Tensor, bias_V: torch.Tensor, targets_M: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The target's logit, float32 [M]; the largest of each chunk, float32 [N, M]; and the sums of exponentials relative
    to it of groups, [N, M, S]: word c of a chunk belongs to group c // G."""
    largest, sums = [], []
    target_logits = torch.zeros_like(targets_M, dtype=torch.float32)
    for first in range(0, len(table_VE), chunk):
        words = slice(first, first + chunk)
        logits_MC = affine(x_ME, table_VE[words], bias_V[words])
        column, here = _columns(targets_M - first, logits_MC.size(1))
        target_logits = torch.where(here, logits_MC.gather(1, column).squeeze(1).float(), target_logits)
        largest_M, sums_MS = _chunk_sums(logits_MC)
        largest.append(largest_M)
        sums.append(F.pad(sums_MS, (0, chunk // GROUP - sums_MS.size(1))))
    return target_logits, torch.stack(largest), torch.stack(sums)


def _chunk_sums(logits_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one chunk: the largest logit, float32 [M], and the sums of groups, as many as there are words for."""
    rows, words = logits_MC.shape
    kernel = kernels.find("chunk_sums", logits_MC)
    if kernel is not None:
        shapes = ((rows,), (rows, -(-words // GROUP)))
        largest_M, sums_MS = (logits_MC.new_empty(shape, dtype=torch.float32) for shape in shapes)
        kernel(logits_MC.contiguous(), largest_M, sums_MS, rows, words, GROUP)
        return largest_M, sums_MS
    largest_M = logits_MC.amax(1).float()
    exps_MC = logits_MC.float().sub_(largest_M[:, None]).exp_()
    return largest_M, F.pad(exps_MC, (0, -words % GROUP)).unflatten(1, (-1, GROUP)).sum(2)


def _chunk_gradients(
    logits_MC: torch.Tensor,
    shift_M: torch.Tensor,
    size_M: torch.Tensor,
    column_M: torch.Tensor,
    sign_M: torch.Tensor,
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
    words_MG = (chunk_M * chunk + group_M * GROUP)[:, None] + torch.arange(GROUP, device=x_ME.device)
    choices = []
    for rows in torch.arange(len(x_ME), device=x_ME.device).split(SAMPLE_ROWS):
        words_RG = words_MG[rows].clamp(max=len(table_VE) - 1)
        rounded_RGE = table_VE[words_RG].to(x_ME.dtype).float()
        logits_RG = (rounded_RGE * x_ME[rows, None].float()).sum(2) + bias_V[
            words_RG
        ]  # not rounded, as `@` may be
        weights_RG = torch.softmax(
            logits_RG.masked_fill(words_MG[rows] >= len(table_VE), float("-inf")), dim=1
        )
        choices.append(_pick(weights_RG, rest_M[rows])[0])
    if not choices:
        return torch.empty_like(chunk_M)
    samples_M = words_MG.gather(1, torch.cat(choices)[:, None]).squeeze(1)
    return samples_M.clamp(max=len(table_VE) - 1)  # of a row with NaN, for which there is no distribution


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A column of `weights` [M, K] for each row, int64 [M], and where in it the number fell: uniform again, [M]."""
    ends = weights.double().cumsum(1)
    points = uniforms * ends[:, -1]
    # Rounding can put a point at the very end, past the last column that has weight.
    chosen = torch.searchsorted(ends, points[:, None], right=True).clamp(max=ends.size(1) - 1)
    weight, end = weights.double().gather(1, chosen), ends.gather(1, chosen)
    return chosen.squeeze(1), ((points[:, None] - (end - weight)) / weight).squeeze(1).clamp(0, 1)
