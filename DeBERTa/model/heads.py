"""Heads: enhanced mask decoder with the language-model head, and the replaced-token head.

Shapes: B batch, L length, h hidden, E embedding width, V vocabulary, M masked positions.
"""

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.model.encoder import ACTIVATION, Deberta, EncoderOutput


class LMHead(nn.Module):
    """dense to the embedding width, activation, LayerNorm, product with the word table, plus a bias per word."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.activation = ACTIVATION[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_Mh: torch.Tensor, word_table_VE: torch.Tensor) -> torch.Tensor:
        """Logits [M, V]."""
        x_ME = self.LayerNorm(self.activation(self.dense(hidden_Mh)))
        return nn.functional.linear(x_ME, word_table_VE, self.bias)


class EnhancedMaskDecoder(nn.Module):
    """Hidden states the head reads (DeBERTa, section 3.2), and the head.

    With `position_biased_input` these are the last layer's. Otherwise absolute positions enter here: the last layer
    runs twice with its keys and values from its own input H, and queries that start as H + position embeddings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_biased_input = config.position_biased_input
        self.lm_head = LMHead(config)

    def decode(
        self, deberta: Deberta, encoded: EncoderOutput, input_ids: torch.Tensor, input_mask: torch.Tensor
    ) -> torch.Tensor:
        """[B, L, h]"""
        if self.position_biased_input:
            return encoded.hidden_states[-1]
        keys = encoded.last_layer_input
        embeddings, encoder = deberta.embeddings, deberta.encoder
        positions = embeddings.embed_proj(embeddings.position_embeddings(embeddings.position_ids(input_ids)))
        rel_embeddings, slots = encoder.relative_positions(input_ids.size(1))
        queries = keys + positions
        for _ in range(2):
            queries = encoder.layer[-1](keys, queries, input_mask > 0, rel_embeddings, slots)
        return queries

    def forward(
        self,
        deberta: Deberta,
        encoded: EncoderOutput,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        masked: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [M, V] at the positions where bool `masked` [B, L] is true, in row-major order."""
        hidden = self.decode(deberta, encoded, input_ids, input_mask)
        return self.lm_head(hidden[masked], deberta.embeddings.word_embeddings.full())


class ReplacedTokenHead(nn.Module):
    """LayerNorm(h_0 + h_i), dense, activation, one logit a position: the first token's state is the context."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.activation = ACTIVATION[config.hidden_act]
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [B, L] from hidden states [B, L, h]."""
        x = self.LayerNorm(hidden_states[:, :1] + hidden_states)
        return self.classifier(self.activation(self.dense(x))).squeeze(-1)
