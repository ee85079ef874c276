"""PyTorch's fused attention with position scores as bias (`--attention sdpa`)."""

import torch
from torch.nn import functional as F

from DeBERTa.model.attention import DisentangledSelfAttention, Keys, expand_slots


class _Gather(torch.autograd.Function):
    """`x.gather(3, index)` that saves the shape of `x` instead of `x` for backward."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(3, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(3, index, grad), None


class SdpaSelfAttention(DisentangledSelfAttention):
    """Disentangled attention through `scaled_dot_product_attention`."""

    def gather_scores(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Gather columns of `scores` [B, H, rows, S] by slots int64 [(B,) rows, columns]."""
        return _Gather.apply(scores, expand_slots(slots, scores))

    def attend(self, q: torch.Tensor, keys: Keys) -> torch.Tensor:
        """Return the context [B, M, H * D] of scaled queries [B, H, M, D]."""
        bias = keys.position_to_content
        if keys.key_table is not None and keys.slots is not None:
            c2p = self.content_to_position(q, keys.key_table, keys.slots)
            bias = c2p if bias is None else c2p + bias
        if bias is None:
            bias = q.new_zeros(()).expand(len(q), 1, q.size(2), keys.k.size(2))
        # The lowest finite bias: with minus infinity a row without real keys would be NaN.
        bias = bias.masked_fill(~keys.input_mask[:, None, None], torch.finfo(q.dtype).min)
        p = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(q, keys.k, keys.v, attn_mask=bias, dropout_p=p, scale=1.0)
        return context.transpose(1, 2).flatten(2)
