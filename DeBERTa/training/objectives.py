"""Training objectives as modules, because DDP and FSDP wrap modules.

Joint RTD needs no objective: `RTDModel` itself is called.
"""

import torch
from torch import nn

from DeBERTa.data.batch import Batch
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.pretraining import (
    DetectionLoss,
    Generated,
    MaskedLanguageModel,
    ReplacedTokenDetectionModel,
    ReplacedTokenOutput,
)
from DeBERTa.model.sharing import SharedTables


class MaskedLMObjective(nn.Module):
    """Masked language modeling on a micro-batch."""

    def __init__(self, model: MaskedLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> MaskedLoss:
        """Return the losses at the masked positions, in evaluation with samples."""
        return self.model.compute_masked_loss(batch, sample=not self.model.training)


class GeneratorObjective(nn.Module):
    """Masked language modeling, and a sample per masked token, on a micro-batch."""

    def __init__(self, model: MaskedLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Generated:
        """Return the losses at the masked positions, and the corrupted ids."""
        return self.model.generate(batch)


class DiscriminatorObjective(nn.Module):
    """Replaced token detection on a micro-batch of corrupted ids."""

    def __init__(self, model: ReplacedTokenDetectionModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, corrupted_ids: torch.Tensor, shared: SharedTables | None, per_token: bool = False
    ) -> DetectionLoss | ReplacedTokenOutput:
        """Return summed losses, or with `per_token` the loss of every position.

        `shared` receives no gradient.
        """
        compute = self.model if per_token else self.model.compute_detection_loss
        return compute(corrupted_ids, batch.input_mask, batch.labels, shared)
