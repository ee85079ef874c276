"""Layers that cast their input for autocast once, instead of once per matmul.

A gradient of each cast would be cast back and added on its own: three passes over [B, L, h] instead of one.
"""

import torch

from DeBERTa.model.attention import RelativePositions
from DeBERTa.model.encoder import Layer


class AutocastModule:
    """Mixin for modules that cast by themselves what autocast would cast."""

    def get_matmul_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype in which matmuls with `x` run."""
        device = x.device.type
        is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_autocast else x.dtype


class AutocastLayer(AutocastModule, Layer):
    """Layer that casts the inputs of attention and feed-forward network once each."""

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return [B, L, h] from [B, L, h]."""
        low, hidden_states = self.cast_copy(hidden_states)
        context = self.attention.self(low, input_mask, positions)
        return self.feed_forward(self.attention.output(context, hidden_states))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., h] from [..., h]."""
        low, x = self.cast_copy(x)
        return self.output(self.intermediate(low), x)

    def cast_copy(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `x` in the dtype of matmuls, and `x`."""
        dtype = self.get_matmul_dtype(x)
        return (x, x) if dtype == x.dtype else _CastCopy.apply(x, dtype)


class _CastCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):  # noqa: ARG004  autograd's signature
        return x.to(dtype), x.view_as(x)

    @staticmethod
    def backward(ctx, grad_low, grad):  # noqa: ARG004  autograd's signature
        return grad + grad_low, None
