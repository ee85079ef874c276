"""Embeddings, transformer layers and encoder (DeBERTa, section 3).

The convolution is that of DeBERTa v2.

Shapes: B batch, L length, h hidden, E embedding width. `input_mask` is bool [B, L], true at real tokens.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from DeBERTa.config import ModelConfig
from DeBERTa.model.attention import DisentangledSelfAttention, RelativePositions, map_to_slots
from DeBERTa.model.sharing import SharedTables, make_table

ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class EncoderOutput(NamedTuple):
    """Outputs of all layers, and the embeddings, [B, L, h] each."""

    hidden_states: tuple[torch.Tensor, ...]
    embeddings: torch.Tensor


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings; projection, LayerNorm, mask, dropout."""

    def __init__(self, config: ModelConfig, sharing: str) -> None:
        super().__init__()
        width = config.embedding_width
        self.word_embeddings = make_table(sharing, config.vocab_size, width)
        self.position_embeddings = make_table(sharing, config.max_position_embeddings, width)
        self.position_biased_input = config.position_biased_input
        self.max_positions = config.max_position_embeddings
        if config.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.has_types = config.type_vocab_size > 0
        has_projection = width != config.hidden_size
        self.embed_proj = (
            nn.Linear(width, config.hidden_size, bias=False) if has_projection else nn.Identity()
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        shared: SharedTables | None,
    ) -> torch.Tensor:
        """Return the embeddings [B, L, h] of `input_ids` int64 [B, L].

        Raises ValueError when positions are added and L exceeds `max_position_embeddings`.
        """
        word_base, position_base = shared if shared is not None else (None, None)
        words = self.word_embeddings(input_ids, word_base)
        return self.embed(words, input_ids, input_mask, token_type_ids, position_base)

    def embed(
        self,
        words: torch.Tensor,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        position_base: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [B, L, h] of `words` [B, L, E], the word embeddings of `input_ids`."""
        x = words
        if self.position_biased_input:
            x = x + self.position_embeddings(self.make_position_ids(input_ids), position_base)
        if self.has_types:
            x = x + self.token_type_embeddings(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        x = self.LayerNorm(self.embed_proj(x))
        return self.dropout(x * input_mask.unsqueeze(-1).to(x.dtype))

    def make_position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the positions int64 [1, L].

        Raises ValueError when the table has fewer rows than L.
        """
        length = input_ids.size(1)
        if length > self.max_positions:
            raise ValueError(
                f"sequence length {length}: max_position_embeddings is {self.max_positions}; "
                "shorten the input or raise max_position_embeddings"
            )
        return torch.arange(length, device=input_ids.device).unsqueeze(0)


class AddNorm(nn.Module):
    """Linear map, dropout, residual addition and LayerNorm."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return [..., h] from `x` [..., width] and `residual` [..., h]."""
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Self-attention and its output map, under the published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = AddNorm(config, config.num_attention_heads * config.head_size)


class Intermediate(nn.Module):
    """The inner linear map of the feed-forward network, and its activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., intermediate_size] from [..., h]."""
        return self.activation(self.dense(x))


class Layer(nn.Module):
    """One transformer layer, post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, input_mask: torch.Tensor, positions: RelativePositions | None
    ) -> torch.Tensor:
        """Return [B, L, h] from [B, L, h]."""
        context = self.attention.self(hidden_states, input_mask, positions)
        return self.feed_forward(self.attention.output(context, hidden_states))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., h] from [..., h]."""
        return self.output(self.intermediate(x), x)

    def decode(
        self,
        query_states: torch.Tensor,
        query_positions: torch.Tensor,
        hidden_states: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        passes: int,
    ) -> torch.Tensor:
        """Apply this layer `passes` times at `query_positions` int64 [B, M] only.

        Queries and the residual start as `query_states` [B, M, h] and are replaced by the output. Keys and
        values always come from `hidden_states` [B, L, h] and are projected once.
        """
        attention = self.attention.self
        keys = attention.project_keys(hidden_states, input_mask, positions, query_positions)
        for _ in range(passes):
            context = attention.attend(attention.project_queries(query_states), keys)
            query_states = self.feed_forward(self.attention.output(context, query_states))
        return query_states


class ConvLayer(nn.Module):
    """Convolution over the embeddings, added to the first layer's output (DeBERTa v2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel = config.conv_kernel_size
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, kernel, padding=kernel // 2)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATION[config.conv_act]

    def forward(
        self, embeddings: torch.Tensor, layer_0: torch.Tensor, input_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return [B, L, h] from two [B, L, h]."""
        mask = input_mask.unsqueeze(-1)
        x = self.conv(embeddings.transpose(1, 2)).transpose(1, 2).masked_fill(~mask, 0)
        x = self.LayerNorm(layer_0 + self.activation(self.dropout(x)))
        return x * mask.to(x.dtype)


class Encoder(nn.Module):
    """The layers, and the relative-position table that they share.

    With `gradient_checkpointing` the backward pass of a layer recomputes its forward pass.
    """

    table_alignment = 1  # rows of the relative-position table are read in multiples of it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if config.relative_attention:
            self.rel_embeddings = nn.Embedding(2 * config.position_span, config.hidden_size)
        self.has_position_norm = config.norm_rel_ebd == "layer_norm"
        if self.has_position_norm:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.conv = ConvLayer(config) if config.conv_kernel_size > 0 else None
        self.gradient_checkpointing = False

    def compute_relative_positions(self, length: int) -> RelativePositions | None:
        """Return the rows of the table that sequences of `length` need.

        None without relative attention.
        """
        if not self.config.position_terms:
            return None
        # On the host: the size of the table depends on it.
        slots = map_to_slots(torch.arange(length - 1, -length, -1), self.config)
        first = int(slots[-1]) // self.table_alignment * self.table_alignment
        rows = math.ceil((int(slots[0]) + 1 - first) / self.table_alignment) * self.table_alignment
        table = self.rel_embeddings.weight[first : first + rows]
        if self.has_position_norm:
            table = self.LayerNorm(table)
        distance_slots = (slots - first).to(table.device, non_blocking=True)
        tokens = torch.arange(length, device=table.device)
        return RelativePositions(table, distance_slots, distance_slots[length - 1 - tokens[:, None] + tokens])

    def run(self, function: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
        """Call a layer or one of its methods, through gradient checkpointing if it is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def iterate_layers(
        self, embeddings: torch.Tensor, input_mask: torch.Tensor, num_layers: int
    ) -> Iterator[torch.Tensor]:
        """Yield the output [B, L, h] of each of the first `num_layers` layers."""
        positions = self.compute_relative_positions(embeddings.size(1))
        hidden_states = embeddings
        for number, layer in enumerate(self.layer[:num_layers]):
            hidden_states = self.run(layer, hidden_states, input_mask, positions)
            if self.conv is not None and number == 0:
                hidden_states = self.conv(embeddings, hidden_states, input_mask)
            yield hidden_states

    def forward(self, embeddings: torch.Tensor, input_mask: torch.Tensor, num_layers: int) -> torch.Tensor:
        """Return the output [B, L, h] of layer `num_layers`.

        Outputs of earlier layers are not stored.
        """
        hidden_states = embeddings
        for hidden_states in self.iterate_layers(embeddings, input_mask, num_layers):  # noqa: B007
            pass
        return hidden_states


class Deberta(nn.Module):
    """Embeddings and encoder: the backbone below the heads.

    sharing: the kind of the embedding tables.
    """

    def __init__(self, config: ModelConfig, sharing: str) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, sharing)
        self.encoder = Encoder(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        shared: SharedTables | None = None,
    ) -> EncoderOutput:
        """Encode `input_ids` int64 [B, L].

        input_mask: [B, L], non-zero at real tokens.
        shared: the generator's tables, for a discriminator that shares embeddings.
        """
        is_real = input_mask > 0
        embeddings = self.embeddings(input_ids, is_real, token_type_ids, shared)
        layers = self.encoder.iterate_layers(embeddings, is_real, len(self.encoder.layer))
        return EncoderOutput(tuple(layers), embeddings)

    def compute_last_hidden_state(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, shared: SharedTables | None = None
    ) -> torch.Tensor:
        """Return the last layer's output [B, L, h] alone, as training needs it."""
        is_real = input_mask > 0
        embeddings = self.embeddings(input_ids, is_real, None, shared)
        return self.encoder(embeddings, is_real, len(self.encoder.layer))
