"""Pretraining models: masked language model, replaced-token detector, RTD.

RTD combines the first two as generator and discriminator.

Shapes: B batch, L length, V vocabulary, M masked positions, N real positions.
"""

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa.config import ModelConfig, RTDConfig
from DeBERTa.data.batch import Batch, MaskedPositions
from DeBERTa.model.encoder import Deberta
from DeBERTa.model.heads import EnhancedMaskDecoder, ReplacedTokenHead
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.sharing import OwnTable, SharedTables, TiedLookup


class MaskedLMOutput(NamedTuple):
    """Results at the masked positions in row-major order.

    loss: float32 [M]. logits: [M, V]. labels: int64 [M].
    """

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


class Generated(NamedTuple):
    """The generator's results at the masked positions.

    corrupted_ids: int64 [B, L], the input ids with its samples at these positions.
    """

    masked: MaskedLoss
    corrupted_ids: torch.Tensor


class DetectionLoss(NamedTuple):
    """Sums over the real positions.

    loss: float32. correct: int64, the number of correct decisions at logit 0.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class ReplacedTokenOutput(NamedTuple):
    """Results of the discriminator.

    loss, labels: float32 [N] at the real positions in row-major order. logits: [B, L].
    """

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def initialize(module: nn.Module, std: float) -> None:
    """Draw the weights of Linear and Embedding from normal(0, `std`), and zero biases.

    GDES residuals and the head's token bias are zero from their constructors. The weights of the convolution
    stay as PyTorch initializes them.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.Linear | nn.Conv1d) and child.bias is not None:
            nn.init.zeros_(child.bias)


class MaskedLanguageModel(nn.Module):
    """Encoder and LM head over one word table: BERT, DeBERTa, or the RTD generator."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.deberta = Deberta(config, "nes")
        self.lm_predictions = EnhancedMaskDecoder(config)
        initialize(self, config.initializer_range)

    def forward(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> MaskedLMOutput:
        """Predict the masked tokens.

        All inputs are int64 [B, L]. `labels` hold the original id where a token is masked, and 0 elsewhere.
        """
        masked = MaskedPositions.from_labels(labels)
        words = self.deberta.embeddings.word_embeddings(input_ids)
        hidden = self.lm_predictions.decode(self.deberta, words, input_ids, input_mask, masked)
        logits = self.lm_predictions.lm_head(hidden, self.get_tables().word)
        targets = labels.flatten()[masked.flat_index]
        return MaskedLMOutput(F.cross_entropy(logits.float(), targets, reduction="none"), logits, targets)

    def compute_masked_loss(self, batch: Batch, is_sampled: bool) -> MaskedLoss:
        """Return the results of `forward` that training needs, without the logits.

        is_sampled: whether to draw a token per masked position from the predicted distribution.
        """
        words, table = TiedLookup.apply(self.get_tables().word, batch.input_ids)
        masked = batch.masked
        hidden = self.lm_predictions.decode(self.deberta, words, batch.input_ids, batch.input_mask, masked)
        targets = batch.labels.flatten()[masked.flat_index]
        uniforms = batch.uniforms.flatten()[masked.flat_index] if is_sampled else None
        return self.lm_predictions.lm_head.compute_loss(hidden, table, targets, uniforms)

    def generate(self, batch: Batch) -> Generated:
        """Predict the masked tokens, and replace them by samples of the prediction."""
        masked = self.compute_masked_loss(batch, is_sampled=True)
        assert masked.samples is not None
        return Generated(masked, batch.input_ids.masked_scatter(batch.labels > 0, masked.samples))

    def get_tables(self) -> SharedTables:
        """Return the embedding tables that a discriminator may share."""
        embeddings = self.deberta.embeddings
        tables = (embeddings.word_embeddings, embeddings.position_embeddings)
        return SharedTables(*(cast(OwnTable, table).weight for table in tables))


class ReplacedTokenDetectionModel(nn.Module):
    """Encoder and replaced-token head.

    sharing: the kind of its embedding tables ("nes": its own).
    """

    def __init__(self, config: ModelConfig, sharing: str = "nes") -> None:
        super().__init__()
        self.config = config
        self.deberta = Deberta(config, sharing)
        self.mask_predictions = ReplacedTokenHead(config)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        labels: torch.Tensor,
        shared: SharedTables | None = None,
    ) -> ReplacedTokenOutput:
        """Decide for every real position whether its token was replaced.

        `input_ids` are the corrupted ids. `labels` hold the original id where masked, and 0 elsewhere. A
        position counts as replaced where the sample differs from the original. `shared`: the generator's
        tables, under GDES and ES.
        """
        logits = self.compute_logits(input_ids, input_mask, shared)
        is_real = input_mask > 0
        labels = is_replaced(input_ids, labels)[is_real].float()
        loss = F.binary_cross_entropy_with_logits(logits[is_real].float(), labels, reduction="none")
        return ReplacedTokenOutput(loss, logits, labels)

    def compute_detection_loss(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        labels: torch.Tensor,
        shared: SharedTables | None = None,
    ) -> DetectionLoss:
        """Return the sums of `forward` that training needs.

        input_ids: the corrupted ids. Padding has weight 0.
        """
        logits = self.compute_logits(input_ids, input_mask, shared).float()
        is_real, replaced = input_mask > 0, is_replaced(input_ids, labels)
        weight = is_real.float()
        loss = F.binary_cross_entropy_with_logits(logits, replaced.float(), weight=weight, reduction="sum")
        return DetectionLoss(loss, (((logits > 0) == replaced) & is_real).sum())

    def compute_logits(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, shared: SharedTables | None
    ) -> torch.Tensor:
        """Return logits [B, L], above 0 for tokens predicted as replaced."""
        return self.mask_predictions(self.deberta.compute_last_hidden_state(input_ids, input_mask, shared))


class RTDModel(nn.Module):
    """Generator and discriminator with shared embeddings (DeBERTaV3, section 3)."""

    def __init__(self, config: RTDConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = MaskedLanguageModel(config.generator)
        self.discriminator = ReplacedTokenDetectionModel(config.discriminator, config.embedding_sharing)

    def forward(
        self, batch: Batch, is_per_token: bool = False
    ) -> tuple[Generated, DetectionLoss | ReplacedTokenOutput]:
        """Generate samples, corrupt the input with them, and detect them.

        is_per_token: return the discriminator's loss of every position instead of their sum.
        """
        generated = self.generator.generate(batch)
        discriminate = self.discriminate if is_per_token else self.compute_detection_loss
        return generated, discriminate(generated.corrupted_ids, batch.input_mask, batch.labels)

    def get_shared_tables(self) -> SharedTables | None:
        """Return the generator's tables for the discriminator, or None under NES."""
        return None if self.config.embedding_sharing == "nes" else self.generator.get_tables()

    def discriminate(
        self, corrupted_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> ReplacedTokenOutput:
        """Run the discriminator with the generator's current tables."""
        return self.discriminator(corrupted_ids, input_mask, labels, self.get_shared_tables())

    def compute_detection_loss(
        self, corrupted_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> DetectionLoss:
        """Return the sums of `discriminate` that training needs."""
        return self.discriminator.compute_detection_loss(
            corrupted_ids, input_mask, labels, self.get_shared_tables()
        )

    @torch.no_grad()
    def merge_discriminator(self) -> dict[str, torch.Tensor]:
        """Return the discriminator's state dict with full tables instead of shared ones."""
        state, shared = self.discriminator.state_dict(), self.get_shared_tables()
        for name, base in shared._asdict().items() if shared else ():
            table = f"deberta.embeddings.{name}_embeddings"
            residual = state.pop(f"{table}._weight", None)
            state[f"{table}.weight"] = base.detach() if residual is None else base + residual
        return state


def build_model(config: ModelConfig | RTDConfig) -> MaskedLanguageModel | RTDModel:
    """Build the model with fresh weights."""
    return MaskedLanguageModel(config) if isinstance(config, ModelConfig) else RTDModel(config)


def is_replaced(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return bool [B, L], true where the sample differs from the original token."""
    return (labels > 0) & (labels != input_ids)


def count_backbone_parameters(model: nn.Module) -> int:
    """Count the elements of the weight matrices of the encoder layers."""
    return sum(
        p.numel() for name, p in model.named_parameters() if ".encoder.layer." in name and p.dim() == 2
    )


def count_embedding_parameters(model: nn.Module) -> int:
    """Count the elements of the word embedding tables, residuals included."""
    return sum(p.numel() for name, p in model.named_parameters() if ".word_embeddings." in name)
