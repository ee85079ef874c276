"""The models that are trained: masked language model, replaced-token detector, and the pair of them.

Shapes: B batch, L length, V vocabulary, M masked positions, N real positions.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa.config import ModelConfig, RTDConfig
from DeBERTa.data.batch import Batch, MaskedPositions
from DeBERTa.model.encoder import Deberta
from DeBERTa.model.heads import EnhancedMaskDecoder, ReplacedTokenHead
from DeBERTa.model.sharing import SharedTables, TiedLookup
from DeBERTa.model.vocabulary import MaskedLoss, vocabulary_loss


class MaskedLMOutput(NamedTuple):
    """At the masked positions in row-major order: `loss` float32 [M], `logits` [M, V], `labels` int64 [M]."""

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


class DetectionLoss(NamedTuple):
    """Sums over the real positions: `loss` float32, `correct` int64 (found out rightly at logit 0)."""

    loss: torch.Tensor
    correct: torch.Tensor


class ReplacedTokenOutput(NamedTuple):
    """`loss` and `labels` float32 [N] at the real positions in row-major order; `logits` [B, L] everywhere."""

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def initialize(module: nn.Module, std: float) -> None:
    """Weights of every Linear and Embedding from normal(0, `std`), biases 0, LayerNorm 1 and 0.

    GDES residuals and the head's word bias are zero from their constructors; the convolution keeps PyTorch's weights.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.Linear | nn.Conv1d) and child.bias is not None:
            nn.init.zeros_(child.bias)


class MaskedLanguageModel(nn.Module):
    """Encoder and language-model head over one word table: BERT, DeBERTa, or the generator of RTD."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.deberta = Deberta(config, "nes")
        self.lm_predictions = EnhancedMaskDecoder(config)
        initialize(self, config.initializer_range)

    def forward(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> MaskedLMOutput:
        """int64 [B, L] each; `labels` hold the original id where a token is masked and 0 elsewhere."""
        masked = MaskedPositions.from_labels(labels)
        words = self.deberta.embeddings.word_embeddings(input_ids)
        hidden = self.lm_predictions.decode(self.deberta, words, input_ids, input_mask, masked)
        logits = self.lm_predictions.lm_head(hidden, self.tables().word)
        targets = labels.flatten()[masked.flat_index]
        return MaskedLMOutput(F.cross_entropy(logits.float(), targets, reduction="none"), logits, targets)

    def masked_loss(self, batch: Batch, sample: bool) -> MaskedLoss:
        """What training needs of `forward`, without ever holding the logits; with `sample`, a draw for each mask."""
        words, table = TiedLookup.apply(self.tables().word, batch.input_ids)
        hidden = self.lm_predictions.decode(
            self.deberta, words, batch.input_ids, batch.input_mask, batch.masked
        )
        head, targets = self.lm_predictions.lm_head, batch.labels.flatten()[batch.masked.flat_index]
        uniforms = batch.uniforms.flatten()[batch.masked.flat_index] if sample else None
        return vocabulary_loss(head.transform(hidden), table, head.bias, targets, uniforms)

    def tables(self) -> SharedTables:
        embeddings = self.deberta.embeddings
        return SharedTables(embeddings.word_embeddings.full(), embeddings.position_embeddings.full())


class ReplacedTokenDetectionModel(nn.Module):
    """Encoder and replaced-token head; `sharing` is where its embedding tables come from ("nes": its own)."""

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
        """int64 [B, L] each; `input_ids` are the corrupted ids, `labels` the original id where masked, 0 elsewhere.

        A position counts as replaced where a masked token was filled with another one than the original. `shared`:
        the generator's tables, needed under GDES and ES.
        """
        logits = self.logits(input_ids, input_mask, shared)
        real = input_mask > 0
        replaced = was_replaced(input_ids, labels)[real].float()
        loss = F.binary_cross_entropy_with_logits(logits[real].float(), replaced, reduction="none")
        return ReplacedTokenOutput(loss, logits, replaced)

    def detection_loss(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        labels: torch.Tensor,
        shared: SharedTables | None = None,
    ) -> DetectionLoss:
        """What training needs of `forward`: padding is weighted away, so that no size depends on the data."""
        logits = self.logits(input_ids, input_mask, shared).float()
        real, replaced = input_mask > 0, was_replaced(input_ids, labels)
        loss = F.binary_cross_entropy_with_logits(
            logits, replaced.float(), weight=real.float(), reduction="sum"
        )
        return DetectionLoss(loss, (((logits > 0) == replaced) & real).sum())

    def logits(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, shared: SharedTables | None
    ) -> torch.Tensor:
        """[B, L]; above 0: taken for replaced."""
        return self.mask_predictions(self.deberta.last_hidden_state(input_ids, input_mask, shared))


class RTDModel(nn.Module):
    """Generator and discriminator, with the embedding sharing of the config (DeBERTaV3, section 3)."""

    def __init__(self, config: RTDConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = MaskedLanguageModel(config.generator)
        self.discriminator = ReplacedTokenDetectionModel(config.discriminator, config.embedding_sharing)

    def shared_tables(self) -> SharedTables | None:
        return None if self.config.embedding_sharing == "nes" else self.generator.tables()

    def discriminate(
        self, corrupted_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> ReplacedTokenOutput:
        """The discriminator on `corrupted_ids` [B, L], with the generator's tables as they are now."""
        return self.discriminator(corrupted_ids, input_mask, labels, self.shared_tables())

    def detection_loss(
        self, corrupted_ids: torch.Tensor, input_mask: torch.Tensor, labels: torch.Tensor
    ) -> DetectionLoss:
        """The same, as training needs it."""
        return self.discriminator.detection_loss(corrupted_ids, input_mask, labels, self.shared_tables())

    @torch.no_grad()
    def standalone_discriminator(self) -> dict[str, torch.Tensor]:
        """The discriminator's state dict with whole tables under `weight`, as a model that shares nothing."""
        state = {
            k: v for k, v in self.discriminator.state_dict().items() if not k.endswith("_embeddings._weight")
        }
        embeddings, shared = self.discriminator.deberta.embeddings, self.shared_tables()
        for name, base in zip(
            ("word_embeddings", "position_embeddings"), shared or (None, None), strict=True
        ):
            state[f"deberta.embeddings.{name}.weight"] = getattr(embeddings, name).full(base)
        return state


def was_replaced(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: where a masked token was filled with another one than the original."""
    return (labels > 0) & (labels != input_ids)


def corrupt(input_ids: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """`input_ids` [B, L] with `samples` int64 [M] at the positions where `labels` > 0, in row-major order."""
    return input_ids.masked_scatter(labels > 0, samples)


def backbone_parameters(model: nn.Module) -> int:
    """Numbers in the weight matrices of the encoder layers: what the presets' sizes count."""
    return sum(
        p.numel() for name, p in model.named_parameters() if ".encoder.layer." in name and p.dim() == 2
    )


def embedding_parameters(model: nn.Module) -> int:
    """Numbers in the word embedding tables, residuals included."""
    return sum(p.numel() for name, p in model.named_parameters() if ".word_embeddings." in name)
