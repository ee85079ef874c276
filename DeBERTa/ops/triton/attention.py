"""Disentangled attention by the Triton kernels, as an autograd function.

Shapes: B batch, L length, H heads, D head size.
W is the length rounded up to full tiles.
"""

import torch
import triton

from DeBERTa.errors import ConfigError
from DeBERTa.ops.dropout import compute_threshold
from DeBERTa.ops.triton import kernels
from DeBERTa.ops.triton.launch import HOPPER, SEQUENCES, LaunchTable, get_launch_table

LARGEST_GRID = 65535  # programs in the second dimension (CUDA programming guide)


def attend(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    input_mask: torch.Tensor,
    dropout: tuple[float, torch.Tensor],
) -> torch.Tensor:
    """Return the context [B, L, H, D] of queries, keys and values.

    Queries are scaled. The context is zero at padding.
    qkv: [B, L, 3, H, D].
    tables: key and query table by distance, contiguous [H, 2W, D], with the distances of
    `list_tile_distances` between queries and keys, and between keys and queries; None for an unused term.
    input_mask: bool [B, L]. dropout: the probability, and a seed int64 [1] on the device.
    """
    p, seed = dropout
    sequences, heads = qkv.size(0), qkv.size(3)
    if sequences * heads > LARGEST_GRID:
        raise ConfigError(
            f"--attention triton: {sequences} sequences in a micro-batch are more than its kernels take with "
            f"{heads} heads; give a larger --accumulative_update, a smaller --eval_batch_size if it is an "
            "evaluation, or --attention sdpa"
        )
    return _Attention.apply(qkv.contiguous(), *tables, input_mask.view(torch.int8), seed, p)


def list_tile_distances(length: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Return the distances of the rows of a table, int64 [2W], from -W up."""
    tile = find_launch_table(device, head_size).tile
    width = triton.cdiv(length, tile) * tile
    return torch.arange(-width, width, device=device)


class _Attention(torch.autograd.Function):
    """Disentangled attention by the forward and backward kernels.

    Saves its inputs, the context, its softmax statistics, and the dropout mask as bits.
    """

    @staticmethod
    def forward(ctx, qkv, key_table, query_table, input_mask, seed, p):
        B, L, _, H, D = qkv.shape
        q, k, v = qkv.unbind(2)
        launches = find_launch_table(q.device, D)
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
        inputs = (key_table, query_table, input_mask, keep_mask)
        options = launches.forward._asdict()
        kernels.forward_kernel[(blocks, B * H)](q, k, v, *inputs, out, lse, *sizes, **options)
        ctx.save_for_backward(qkv, *inputs, out, lse)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, *inputs, out, lse = ctx.saved_tensors
        q, k, v = qkv.unbind(2)
        key_table, query_table, *_ = inputs
        B, L, H, D = q.shape
        launches = find_launch_table(q.device, D)
        tile, blocks = launches.tile, triton.cdiv(L, launches.tile)
        grid = (blocks, B * H)
        grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
        kernels.delta_kernel[grid](out, grad_out, delta, H, L, D, tile)
        grad_qkv = torch.empty_like(qkv)
        grad_q, grad_k, grad_v = grad_qkv.unbind(2)
        grad_scores = q.new_empty(B, H, blocks * tile, blocks * tile)
        outputs = (grad_k, grad_v, grad_scores)
        options = launches.key_gradient._asdict()
        kernels.key_gradient_kernel[grid](
            q, k, v, *inputs, grad_out, lse, delta, *outputs, *ctx.sizes, **options
        )
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
        return grad_qkv, *grad_tables, None, None, None


def find_launch_table(device: torch.device, head_size: int) -> LaunchTable:
    """Return the launch options for `device`.

    On a CPU, where the interpreter runs the kernels, these are the options of an H100.
    """
    is_gpu = device.type == "cuda"
    return get_launch_table(torch.cuda.get_device_capability(device) if is_gpu else HOPPER, head_size)
