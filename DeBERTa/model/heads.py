"""Heads: enhanced mask decoder with the language-model head, and the replaced-token head.

Shapes: B batch, L length, h hidden, E embedding width, V vocabulary, M masked positions.
"""

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.data.batch import MaskedPositions
from DeBERTa.model.attention import gather
from DeBERTa.model.encoder import ACTIVATION, Deberta


class LMHead(nn.Module):
    """dense to the embedding width, activation, LayerNorm, product with the word table, plus a bias per word."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.activation = ACTIVATION[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_Mh: torch.Tensor) -> torch.Tensor:
        """What is compared with every word of the table, [M, E]."""
        return self.LayerNorm(self.activation(self.dense(hidden_Mh)))

    def forward(self, hidden_Mh: torch.Tensor, word_table_VE: torch.Tensor) -> torch.Tensor:
        """Logits [M, V]."""
        return nn.functional.linear(self.transform(hidden_Mh), word_table_VE, self.bias)


class EnhancedMaskDecoder(nn.Module):
    """The last layer at the masked positions (DeBERTa, section 3.2), and the head.

    With `position_biased_input` the last layer is applied as usual. Otherwise absolute positions enter here: it is
    applied twice with keys and values from its own input H, and queries that start as H + position embeddings. Either
    way only masked positions are read, so that queries, feed-forward and head are computed for these alone.
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
        """[M, h]: hidden states at the masked positions, in row-major order. `words` [B, L, E]: the rows of the ids."""
        embeddings, encoder = deberta.embeddings, deberta.encoder
        real = input_mask > 0
        positions = encoder.relative_positions(input_ids.size(1))
        embedded = embeddings.embed(words, input_ids, real, None, None)
        hidden_states = encoder(embedded, real, positions, len(encoder.layer) - 1)  # the last layer's input
        queries = gather(hidden_states, 1, masked.positions[:, :, None].expand(-1, -1, hidden_states.size(2)))
        if not self.position_biased_input:
            absolute = embeddings.position_embeddings(embeddings.position_ids(input_ids))
            queries = queries + embeddings.embed_proj(absolute)[0][masked.positions]
        passes = 1 if self.position_biased_input else 2
        last = encoder.layer[-1]
        decoded = encoder.run(
            last.selected, queries, masked.positions, hidden_states, real, positions, passes
        )
        return decoded.flatten(0, 1).index_select(0, masked.valid_index)


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
