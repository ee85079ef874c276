"""Embeddings, transformer layers, encoder (DeBERTa, section 3; the convolution is DeBERTa v2's).

Shapes: B batch, L length, h hidden, E embedding width. `input_mask` is bool [B, L], true at real tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from DeBERTa.config import ModelConfig
from DeBERTa.model import kernels
from DeBERTa.model.attention import DisentangledSelfAttention, RelativePositions, map_to_slots
from DeBERTa.model.backends import flash_lookup
from DeBERTa.model.dropout import Dropout
from DeBERTa.model.products import affine, affine_gradients, linear, tiled
from DeBERTa.model.sharing import SharedTables, make_table

ACTIVATION = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class EncoderOutput(NamedTuple):
    """`hidden_states`: the output of every layer, `num_hidden_layers` tensors [B, L, h]; `embeddings` [B, L, h]."""

    hidden_states: tuple[torch.Tensor, ...]
    embeddings: torch.Tensor


class Embeddings(nn.Module):
    """Word, and where configured position and type embeddings, projected, normalised, masked, dropped out."""

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
        project = width != config.hidden_size
        self.embed_proj = nn.Linear(width, config.hidden_size, bias=False) if project else nn.Identity()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        shared: SharedTables | None,
    ) -> torch.Tensor:
        """[B, L, h]. Raises ValueError when L exceeds `max_position_embeddings` and positions are added."""
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
        """What follows the lookup of `words` [B, L, E]."""
        x = words
        if self.position_biased_input:
            x = x + self.position_embeddings(self.position_ids(input_ids), position_base)
        if self.has_types:
            x = x + self.token_type_embeddings(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        x = self.LayerNorm(self.embed_proj(x))
        return self.dropout(x * input_mask.unsqueeze(-1).to(x.dtype))

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [1, L]"""
        length = input_ids.size(1)
        if length > self.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens needs max_position_embeddings >= {length}, "
                f"but the model config has {self.max_positions}"
            )
        return torch.arange(length, device=input_ids.device).unsqueeze(0)


class FeedForward(torch.autograd.Function):
    """`linear(activation(linear(x)))` that keeps little for its backward pass.

    `x` [..., h]; `inner`, `outer`: weight and bias of the two maps. Kept are `x` in the type of the products and, off
    CPUs, the activation's input [..., intermediate_size], which a CPU computes again, as everyone does its output:
    memory there costs more time than the product.
    """

    @staticmethod
    def forward(ctx, x, inner_weight, inner_bias, outer_weight, outer_bias, activation):
        kind = x.device.type
        low = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if low else x.dtype
        ctx.activation, ctx.types = activation, (x.dtype, inner_weight.dtype)
        x = x.to(dtype)
        weights, size, width = (inner_weight, inner_bias, outer_weight), x.size(-1), len(inner_weight)
        shapes = (width, size), (width,), (size, width), (size,)
        fitting = zip((*weights, outer_bias), shapes, strict=True)
        kernel = tiled("feed_forward", x, *fitting) if activation is F.gelu else None
        ctx.tiled = kernel is not None
        if kernel is not None:
            ctx.save_for_backward(x, *weights, None)
            y = x.new_empty(x.shape)
            kernel(x.contiguous(), *weights, outer_bias, y, x.numel() // size, size, width)
            return y
        hidden = affine(x, inner_weight, inner_bias)
        ctx.save_for_backward(x, *weights, None if kind == "cpu" else hidden)
        return affine(activation(hidden), outer_weight, outer_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner_weight, inner_bias, outer_weight, hidden = ctx.saved_tensors
        x_type, parameter_type = ctx.types
        grad = grad.to(x.dtype)
        if ctx.tiled:
            (width, size), dx = inner_weight.shape, x.new_empty(x.shape)
            gradients = [torch.empty_like(inner_weight), torch.empty_like(inner_bias)]
            gradients += [torch.empty_like(outer_weight), inner_bias.new_empty(size)]
            weights = inner_weight, inner_bias, grad.contiguous(), outer_weight
            kernel = kernels.find("feed_forward_gradients", x, inner_weight)
            kernel(x.contiguous(), *weights, dx, *gradients, x.numel() // size, size, width)
            return dx.to(x_type), *gradients, None
        if hidden is None:
            hidden = affine(x, inner_weight, inner_bias)
        dactivated = grad @ outer_weight.to(x.dtype)
        kernel = kernels.find("gelu_gradients", hidden) if ctx.activation is F.gelu else None
        if kernel is None:
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                activated = ctx.activation(hidden)
            (dhidden,) = torch.autograd.grad(activated, hidden, dactivated)
        else:
            kernel(hidden, dactivated, hidden.numel())
            activated, dhidden = hidden, dactivated
        activated = activated.detach()
        dx, *inner = affine_gradients(dhidden, x, inner_weight)
        _, *outer = affine_gradients(grad, activated, outer_weight, inputs=False)
        return dx.to(x_type), *(gradient.to(parameter_type) for gradient in (*inner, *outer)), None


class AddNorm(nn.Module):
    """dense, dropout, add the residual, LayerNorm"""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.add(linear(x, self.dense), residual)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What follows the dense map."""
        return self.LayerNorm(self.dropout.add(residual, x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = AddNorm(config, config.num_attention_heads * config.head_size)


class Intermediate(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION[config.hidden_act]


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
        """[B, L, h] from [B, L, h]."""
        return self.finish(self.attention.self(hidden_states, input_mask, positions), hidden_states)

    def finish(self, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What follows the attention, at any positions."""
        x = self.attention.output(context, residual)
        inner, outer, activation = self.intermediate.dense, self.output.dense, self.intermediate.activation
        if torch.compiler.is_compiling():  # the compiler decides by itself what to compute again
            return self.output.add(outer(activation(inner(x))), x)
        fed = FeedForward.apply(x, inner.weight, inner.bias, outer.weight, outer.bias, activation)
        return self.output.add(fed, x)

    def selected(
        self,
        query_states: torch.Tensor,
        at: torch.Tensor,
        hidden_states: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        passes: int,
    ) -> torch.Tensor:
        """This layer's output [B, M, h] at positions `at` int64 [B, M] only, applied `passes` times.

        Queries and the residual start as `query_states` [B, M, h] and are replaced by the output; keys and values
        always come from `hidden_states` [B, L, h] and are projected once.
        """
        attention = self.attention.self
        k, v = attention.project(hidden_states, attention.key_proj, attention.value_proj)
        keys = attention.with_positions(k, v, input_mask, positions)
        position_keys = attention.selected_position_keys(keys, at)
        for _ in range(passes):
            query_states = self.finish(
                attention.selected(query_states, at, keys, position_keys), query_states
            )
        return query_states


class ConvLayer(nn.Module):
    """Adds n-gram context from the embeddings to the first layer's output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel = config.conv_kernel_size
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, kernel, padding=kernel // 2)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATION[config.conv_act]

    def forward(
        self, embeddings: torch.Tensor, layer_0: torch.Tensor, input_mask: torch.Tensor
    ) -> torch.Tensor:
        mask = input_mask.unsqueeze(-1)
        x = self.conv(embeddings.transpose(1, 2)).transpose(1, 2).masked_fill(~mask, 0)
        x = self.LayerNorm(layer_0 + self.activation(self.dropout(x)))
        return x * mask.to(x.dtype)


class Encoder(nn.Module):
    """Layers and what they share. With `gradient_checkpointing` a layer's backward pass computes the layer again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if config.relative_attention:
            self.rel_embeddings = nn.Embedding(2 * config.position_span, config.hidden_size)
        self.normalise_positions = config.norm_rel_ebd == "layer_norm"
        if self.normalise_positions:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.conv = ConvLayer(config) if config.conv_kernel_size > 0 else None
        self.gradient_checkpointing = False

    def relative_positions(self, length: int) -> RelativePositions | None:
        """The rows of the table that sequences of `length` can need, normalised; None without relative attention."""
        if not self.config.position_terms:
            return None
        slots = map_to_slots(torch.arange(length - 1, -length, -1), self.config)
        first = int(slots[-1])
        table = self.rel_embeddings.weight[first : int(slots[0]) + 1]
        rows = slots - first
        lookup = flash_lookup(rows, table.device) if self.layer[0].attention.self.backend == "flash" else None
        table = self.LayerNorm(table) if self.normalise_positions else table
        return RelativePositions(table, rows.to(table.device, non_blocking=True), lookup)

    def run(self, function: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
        """`function(*inputs)`, a layer or part of one, keeping what its backward pass needs, or its inputs alone."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)  # draws the same dropout again
        return function(*inputs)

    def outputs(
        self,
        embeddings: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        layers: int,
    ) -> Iterator[torch.Tensor]:
        """The output of each of the first `layers` layers, [B, L, h]."""
        hidden_states = embeddings
        for number, layer in enumerate(self.layer[:layers]):
            hidden_states = self.run(layer, hidden_states, input_mask, positions)
            if self.conv is not None and number == 0:
                hidden_states = self.conv(embeddings, hidden_states, input_mask)
            yield hidden_states

    def forward(
        self,
        embeddings: torch.Tensor,
        input_mask: torch.Tensor,
        positions: RelativePositions | None,
        layers: int,
    ) -> torch.Tensor:
        """The output of the last of these alone, so that no other needs memory; without layers, `embeddings`."""
        hidden_states = embeddings
        for hidden_states in self.outputs(embeddings, input_mask, positions, layers):  # noqa: B007
            pass
        return hidden_states


class Deberta(nn.Module):
    """Embeddings and encoder: the backbone both heads stand on. `sharing` is the kind of embedding tables."""

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
        """`input_ids` int64 [B, L]; `input_mask` [B, L], non-zero at real tokens; `shared`: the generator's tables."""
        inputs = self._encoder_inputs(input_ids, input_mask, token_type_ids, shared)
        return EncoderOutput(tuple(self.encoder.outputs(*inputs)), inputs[0])

    def last_hidden_state(
        self, input_ids: torch.Tensor, input_mask: torch.Tensor, shared: SharedTables | None = None
    ) -> torch.Tensor:
        """The last layer's output [B, L, h], as training needs it."""
        return self.encoder(*self._encoder_inputs(input_ids, input_mask, None, shared))

    def _encoder_inputs(
        self,
        input_ids: torch.Tensor,
        input_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        shared: SharedTables | None,
    ) -> tuple[torch.Tensor, torch.Tensor, RelativePositions | None, int]:
        input_mask = input_mask > 0
        embeddings = self.embeddings(input_ids, input_mask, token_type_ids, shared)
        return (
            embeddings,
            input_mask,
            self.encoder.relative_positions(input_ids.size(1)),
            len(self.encoder.layer),
        )
