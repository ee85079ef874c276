"""Masked language model with enhanced mask decoder, for transformers.

To be loaded with `trust_remote_code=True`.
DeBERTa (https://arxiv.org/abs/2006.03654), section 3.2: absolute positions enter before the last layer.
`DebertaV2ForMaskedLM` lacks this decoder; its encoder is used here. Weights have the published names.

Shapes: B batch, L length, h hidden, E embedding width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DebertaV2Model, DebertaV2PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MaskedLMOutput


class LMHead(nn.Module):
    """Linear map, activation, LayerNorm, matmul with the word table, bias per token."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_BLh, word_table_VE):
        """Return logits [B, L, V]."""
        return F.linear(self.LayerNorm(self.activation(self.dense(hidden_BLh))), word_table_VE, self.bias)


class EnhancedMaskDecoder(nn.Module):
    """The last layer applied twice to queries with absolute positions, and the head."""

    def __init__(self, config):
        super().__init__()
        self.lm_head = LMHead(config)

    def decode(self, deberta, hidden_states, attention_mask, position_ids):
        """Return [B, L, h] of `hidden_states` [B, L, h], the input of the last layer."""
        embeddings, encoder = deberta.embeddings, deberta.encoder
        positions = embeddings.position_embeddings(position_ids)
        if embeddings.embed_proj is not None:
            positions = embeddings.embed_proj(positions)
        queries = hidden_states + positions
        mask = encoder.get_attention_mask(attention_mask)
        relative_positions = encoder.get_rel_pos(hidden_states)
        table = encoder.get_rel_embedding()
        for _ in range(2):
            queries = encoder.layer[-1](
                hidden_states,
                mask,
                query_states=queries,
                relative_pos=relative_positions,
                rel_embeddings=table,
                output_attentions=False,
            )[0]
        return queries


class DebertaForMaskedLM(DebertaV2PreTrainedModel):
    """Encoder and LM head over one word table.

    With `position_biased_input` it is the head of BERT.
    """

    _keys_to_ignore_on_load_unexpected = [r"mask_predictions.*"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        if not config.position_biased_input:
            table = nn.Embedding(config.max_position_embeddings, config.embedding_size)
            self.deberta.embeddings.position_embeddings = table
        self.lm_predictions = EnhancedMaskDecoder(config)
        self.post_init()

    def forward(  # noqa: PLR0913 - the arguments of transformers
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """Return logits [B, L, V], and the mean loss where `labels` [B, L] are not -100."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        length, device = tokens.shape[1], tokens.device
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence length {length}: max_position_embeddings is {self.config.max_position_embeddings}"
            )
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], device=device)
        if position_ids is None:
            position_ids = torch.arange(length, device=device).unsqueeze(0)
        outputs = self.deberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=True,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        if not self.config.position_biased_input:
            last_input = outputs.hidden_states[-2]
            hidden = self.lm_predictions.decode(self.deberta, last_input, attention_mask, position_ids)
        logits = self.lm_predictions.lm_head(hidden, self.deberta.embeddings.word_embeddings.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()
