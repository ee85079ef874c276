"""Replaced token detection, for `transformers` with `trust_remote_code=True`.

DeBERTaV3 (https://arxiv.org/abs/2111.09543): which tokens of a text are not the original ones. Weights have
the published names.

Shapes: B batch, L length, h hidden.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DebertaV2Model, DebertaV2PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput


@dataclass
class ReplacedTokenOutput(ModelOutput):
    """Logits [B, L], above 0 where a token seems replaced; the loss with labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ReplacedTokenHead(nn.Module):
    """LayerNorm(h_0 + h_i), linear map, activation and one logit per token."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_BLh):
        """Return logits [B, L]."""
        x_BLh = self.LayerNorm(hidden_BLh[:, :1] + hidden_BLh)
        return self.classifier(self.activation(self.dense(x_BLh))).squeeze(-1)


class DebertaForReplacedTokenDetection(DebertaV2PreTrainedModel):
    """Encoder and replaced-token head: the discriminator of DeBERTaV3."""

    _keys_to_ignore_on_load_unexpected = [r"position_embeddings", r"lm_predictions.*"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.mask_predictions = ReplacedTokenHead(config)
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
        """Return logits [B, L], and the mean loss over real positions.

        labels: [B, L], 1 where a token was replaced, else 0.
        """
        outputs = self.deberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.mask_predictions(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            is_real = torch.ones_like(logits) if attention_mask is None else attention_mask
            is_real = is_real > 0
            loss = F.binary_cross_entropy_with_logits(logits[is_real], labels[is_real].to(logits.dtype))
        output = ReplacedTokenOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if return_dict is not False else output.to_tuple()
