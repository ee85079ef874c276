"""Language-model head with enhanced mask decoder, and replaced-token head.

Shapes: B batch, L length, h hidden, E embedding width, V vocabulary, M masked positions.
"""

from typing import cast

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.data.batch import MaskedPositions
from DeBERTa.model.encoder import ACTIVATION, Deberta, Layer
from DeBERTa.model.losses import ChunkOperations, MaskedLoss, compute_vocabulary_loss


class LMHead(nn.Module):
    """Linear map, activation, LayerNorm, matmul with the word table, bias per token."""

    operations = ChunkOperations()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.activation = ACTIVATION[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_Mh: torch.Tensor) -> torch.Tensor:
        """Return the input [M, E] of the matmul with the word table."""
        return self.LayerNorm(self.activation(self.dense(hidden_Mh)))

    def forward(self, hidden_Mh: torch.Tensor, word_table_VE: torch.Tensor) -> torch.Tensor:
        """Return logits [M, V]."""
        return nn.functional.linear(self.transform(hidden_Mh), word_table_VE, self.bias)

    def compute_loss(
        self,
        hidden_Mh: torch.Tensor,
        word_table_VE: torch.Tensor,
        targets_M: torch.Tensor,
        uniforms_M: torch.Tensor | None,
    ) -> MaskedLoss:
        """Return loss and correctness without computing all logits [M, V] at once.

        With `uniforms_M`, a sample per masked position is returned, too.
        """
        x_ME = self.transform(hidden_Mh)
        return compute_vocabulary_loss(x_ME, word_table_VE, self.bias, targets_M, uniforms_M, self.operations)


class EnhancedMaskDecoder(nn.Module):
    """The last layer at the masked positions (DeBERTa, section 3.2), and the head.

    With `position_biased_input` the last layer is applied as usual. Otherwise absolute positions enter here:
    the layer is applied twice with keys and values from its own input H, and queries that start as H +
    position embeddings, as in the published code (the paper starts from position embeddings). In both cases
    only masked positions are read, so queries, feed-forward and head are computed for these alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_biased_input = config.position_biased_input
        self.lm_head = LMHead(config)

    def decode(
        self,
        deberta: Deberta,
        words: torch.Tensor,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        masked: MaskedPositions,
    ) -> torch.Tensor:
        """Return hidden states [M, h] at the masked positions in row-major order.

        words: [B, L, E], the word embeddings of `input_ids` [B, L].
        """
        embeddings, encoder = deberta.embeddings, deberta.encoder
        is_real = input_mask > 0
        embedded = embeddings.embed(words, input_ids, is_real, None, None)
        hidden_states = encoder(embedded, is_real, len(encoder.layer) - 1)  # the last layer's input
        batch, length = input_ids.shape
        rows = masked.positions + length * torch.arange(batch, device=input_ids.device).unsqueeze(1)
        # Not an index: `embedding` has a backward pass that adds rows in the same order every time, on a CPU
        # and on a GPU.
        queries = nn.functional.embedding(rows, hidden_states.flatten(0, 1))
        passes = 1
        if not self.position_biased_input:
            absolute = embeddings.position_embeddings(embeddings.make_position_ids(input_ids))
            queries = queries + nn.functional.embedding(masked.positions, embeddings.embed_proj(absolute)[0])
            passes = 2
        positions = encoder.compute_relative_positions(length)
        decode = cast(Layer, encoder.layer[-1]).decode
        decoded = encoder.run(decode, queries, masked.positions, hidden_states, is_real, positions, passes)
        return nn.functional.embedding(masked.valid_index, decoded.flatten(0, 1))


class ReplacedTokenHead(nn.Module):
    """LayerNorm(h_0 + h_i), linear map, activation and one logit per token.

    h_0 is the hidden state of [CLS], added as in the published code; the papers do not say so.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.activation = ACTIVATION[config.hidden_act]
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [B, L] of hidden states [B, L, h]."""
        x = self.LayerNorm(hidden_states[:, :1] + hidden_states)
        return self.classifier(self.activation(self.dense(x))).squeeze(-1)
