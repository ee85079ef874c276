"""A batch of token ids with the positions of its masked tokens.

Shapes: B batch, L length, M masked tokens of the batch, P masked tokens of the sequence that has the most.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class MaskedPositions(NamedTuple):
    """Indices of the masked tokens in row-major order.

    They are computed on the host with the batch, so that no step synchronizes with the device for them.

    Attributes:
        positions: int64 [B, P], positions in each sequence, padded with positions that are not masked.
        valid_index: int64 [M], indices of the masked tokens in the flattened `positions`.
        flat_index: int64 [M], indices of the masked tokens in a flattened [B, L].
    """

    positions: torch.Tensor
    valid_index: torch.Tensor
    flat_index: torch.Tensor

    @staticmethod
    def from_labels(labels: torch.Tensor) -> "MaskedPositions":
        """Find the masked positions of `labels`.

        `labels`: int64 [B, L], non-zero where masked.
        """
        is_masked = labels > 0
        counts = is_masked.sum(1, keepdim=True)
        most = int(counts.max()) if len(labels) else 0
        positions = torch.argsort(~is_masked, dim=1, stable=True)[:, :most]
        is_valid = torch.arange(most, device=labels.device) < counts
        return MaskedPositions(
            positions, is_valid.flatten().nonzero().squeeze(1), is_masked.flatten().nonzero().squeeze(1)
        )


class Batch(NamedTuple):
    """Masked sequences of one rank, [B, L] unless stated otherwise.

    Ids are int32 as data workers make them, and int64 on the device of the model (`to`).

    Attributes:
        input_ids: the token ids, with masked tokens replaced.
        input_mask: bool, true for tokens, false for padding.
        labels: the original id where masked, 0 elsewhere.
        uniforms: float64 [B, L] in [0, 1), which draw the samples at masked positions.
        masked: the positions of the masked tokens.
        real_tokens: the number of tokens that are not padding, [CLS] and [SEP] included.
    """

    input_ids: torch.Tensor
    input_mask: torch.Tensor
    labels: torch.Tensor
    uniforms: torch.Tensor
    masked: MaskedPositions
    real_tokens: int

    @staticmethod
    def from_tensors(
        input_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor, uniforms: torch.Tensor
    ) -> "Batch":
        """Create a batch from tensors on the host."""
        masked = MaskedPositions.from_labels(labels)
        return Batch(input_ids, input_mask, labels, uniforms, masked, int(input_mask.sum()))

    @property
    def masked_tokens(self) -> int:
        """Return the number of masked tokens."""
        return len(self.masked.flat_index)

    def split(self, micro_batches: int) -> list["Batch"]:
        """Split a batch on the host into consecutive micro-batches."""
        if micro_batches == 1:
            return [self]
        chunks = (tensor.tensor_split(micro_batches) for tensor in self[:4])
        return [Batch.from_tensors(*tensors) for tensors in zip(*chunks, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device asynchronously (`non_blocking`), with int64 ids."""
        moved = self._apply(lambda tensor: tensor.to(device, non_blocking=True))
        return moved._replace(input_ids=moved.input_ids.long(), labels=moved.labels.long())

    def pin_memory(self) -> "Batch":
        """Copy the batch to pinned memory."""
        return self._apply(torch.Tensor.pin_memory)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        input_ids, input_mask, labels, uniforms = map(function, self[:4])
        masked = MaskedPositions(*map(function, self.masked))
        return Batch(input_ids, input_mask, labels, uniforms, masked, self.real_tokens)
