"""Disentangled attention by the Triton kernels, as an autograd function.

Shapes: B batch, L length, H heads, D head size, S rows of the relative-position table.
W is the length rounded up to full tiles.
"""

import torch
import triton

from DeBERTa.ops.dropout import compute_threshold
from DeBERTa.ops.triton import kernels
from DeBERTa.ops.triton.launch import HOPPER, LAUNCH_TABLES, SEQUENCES, LaunchTable


@torch.compiler.disable  # a compiled layer is compiled around it
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    input_mask: torch.Tensor,
    dropout: tuple[float, torch.Tensor],
) -> torch.Tensor:
    """Return the context [B, L, H, D] of scaled queries, keys and values.

    q, k, v: [B, L, H, D], dense in the last dimension.
    tables: key and query table by distance, [H, 2W, D], from `expand_table`; None for an unused term.
    input_mask: bool [B, L]. dropout: the probability, and a seed int64 [1] on the device.
    """
    p, seed = dropout
    return _Attention.apply(q, k, v, *tables, input_mask.to(torch.int8), seed, p)


def expand_table(table_HSD: torch.Tensor, distance_slots: torch.Tensor, sign: int) -> torch.Tensor:
    """Return one row per distance -W .. W - 1 times `sign`, contiguous [H, 2W, D].

    distance_slots: int64 [2L - 1], from distance L - 1 down, as in `RelativePositions`.
    Distances of padding repeat the last row.
    """
    length = (len(distance_slots) + 1) // 2
    tile = get_launch_table(distance_slots.device).tile
    width = triton.cdiv(length, tile) * tile
    distances = torch.arange(-width, width, device=distance_slots.device).clamp(1 - length, length - 1)
    return _Expand.apply(table_HSD, distance_slots[length - 1 - sign * distances])


class _Expand(torch.autograd.Function):
    """`table.index_select(1, slots)` with a deterministic gradient.

    The gradient is a matmul with a one-hot matrix, whose order of summation is fixed.
    """

    @staticmethod
    def forward(ctx, table_HSD, slots):
        ctx.save_for_backward(slots)
        ctx.rows = table_HSD.size(1)
        return table_HSD.index_select(1, slots)

    @staticmethod
    def backward(ctx, grad):
        (slots,) = ctx.saved_tensors
        one_hot = (slots == torch.arange(ctx.rows, device=slots.device)[:, None]).to(grad.dtype)
        return one_hot @ grad, None


class _Attention(torch.autograd.Function):
    """Disentangled attention by the forward and backward kernels.

    Saves q, k, v, the context, its softmax statistics, and the dropout mask as bits.
    """

    @staticmethod
    def forward(ctx, q, k, v, key_table, query_table, input_mask, seed, p):  # noqa: PLR0913  autograd's inputs
        B, L, H, D = q.shape
        is_strided_alike = q.stride() == k.stride() == v.stride() and q.stride(0) == L * q.stride(1)
        if not is_strided_alike or q.stride(3) != 1:
            q, k, v = (x.contiguous() for x in (q, k, v))
        launches = get_launch_table(q.device)
        blocks = triton.cdiv(L, launches.tile)
        words = blocks * launches.tile // 32
        out, lse = q.new_empty(B, L, H, D), q.new_empty(B, H, L, dtype=torch.float32)
        keep_mask = input_mask  # not read without dropout
        if p:
            rows = B * H * L
            keep_mask = torch.empty(rows, words, dtype=torch.int32, device=q.device)
            group = 4 if L % 4 == 0 else 1
            grid = (triton.cdiv(rows, 64), triton.cdiv(words, 2))
            kernels.draw_mask_kernel[grid](
                seed, keep_mask, rows, compute_threshold(p), L, words, group, 64, 2
            )
        has_terms = (key_table is not None, query_table is not None)
        sizes = (H, q.stride(1), q.stride(2), 1 / (1 - p), L, D, words, p > 0, *has_terms, launches.tile)
        inputs = (q, k, v, key_table, query_table, input_mask, keep_mask)
        options = launches.forward._asdict()
        kernels.forward_kernel[(blocks, B * H)](*inputs, out, lse, *sizes, **options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *inputs, out, lse = ctx.saved_tensors
        q, k, _, key_table, query_table, *_ = inputs
        B, L, H, D = q.shape
        launches = get_launch_table(q.device)
        tile, blocks = launches.tile, triton.cdiv(L, launches.tile)
        grid = (blocks, B * H)
        grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
        kernels.delta_kernel[grid](out, grad_out, delta, H, L, D, tile)
        grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
        grad_scores = q.new_empty(B, H, blocks * tile, blocks * tile)
        outputs = (grad_k, grad_v, grad_scores)
        options = launches.key_gradient._asdict()
        kernels.key_gradient_kernel[grid](*inputs, grad_out, lse, delta, *outputs, *ctx.sizes, **options)
        strides = (H, q.stride(1), q.stride(2), L, D)
        options = launches.query_gradient._asdict()
        has_c2p = key_table is not None
        kernels.query_gradient_kernel[grid](
            k, key_table, grad_scores, grad_q, *strides, has_c2p, tile, **options
        )
        grad_tables = []
        for table, x in ((key_table, q), (query_table, k)):
            grad_table = None
            if table is not None:
                parts = triton.cdiv(B, SEQUENCES)
                sums = torch.empty(parts, *table.shape, dtype=torch.float32, device=q.device)
                tail = (B, *strides, table is query_table, SEQUENCES, tile)
                options = launches.table_gradient._asdict()
                kernels.table_gradient_kernel[(2 * blocks, H, parts)](x, grad_scores, sums, *tail, **options)
                grad_table = sums.sum(0).to(table.dtype)
            grad_tables.append(grad_table)
        return grad_q, grad_k, grad_v, *grad_tables, None, None, None


def get_launch_table(device: torch.device) -> LaunchTable:
    """Return the launch options for `device`.

    On a CPU, where the interpreter runs the kernels, these are the options of an H100.
    """
    return LAUNCH_TABLES[torch.cuda.get_device_capability(device)] if device.type == "cuda" else HOPPER
