"""The encoder against an independent implementation: `DebertaV2Model` of transformers, on random configs."""

import itertools

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from DeBERTa import ModelConfig
from DeBERTa.model.encoder import Deberta

BASE = {
    "vocab_size": 90,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "position_biased_input": False,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-7,
}
RELATIVE = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


def iterate_cases():
    """Yield position terms x buckets (shorter than the lengths) x shared or own projections, and others."""
    for terms, buckets, shared in itertools.product(
        ("c2p", "p2c", "c2p|p2c", "none"), (6, -1), (True, False)
    ):
        options = {"pos_att_type": terms, "position_buckets": buckets, "share_att_key": shared}
        yield f"{terms}-buckets{buckets}-{'shared' if shared else 'own'}", BASE | RELATIVE | options
    yield "absolute", BASE | {"relative_attention": False, "position_biased_input": True}
    yield (
        "no-norm",
        BASE | RELATIVE | {"pos_att_type": "c2p|p2c", "position_buckets": 8, "norm_rel_ebd": "none"},
    )
    yield "types", BASE | RELATIVE | {"pos_att_type": "c2p|p2c", "position_buckets": 8, "type_vocab_size": 3}
    yield "narrow-embedding", BASE | RELATIVE | {"pos_att_type": "c2p|p2c", "embedding_size": 10}
    yield "conv", BASE | RELATIVE | {"pos_att_type": "p2c|c2p", "conv_kernel_size": 3, "conv_act": "gelu"}


def build_reference(config: dict) -> DebertaV2Model:
    terms = [term for term in config.get("pos_att_type", "none").split("|") if term != "none"]
    renamed = config | {"pos_att_type": terms, "hidden_act": "gelu"}
    return DebertaV2Model(DebertaV2Config(**renamed)).eval()


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in iterate_cases()])
def test_hidden_states(config, length):
    torch.manual_seed(length)
    theirs = build_reference(config)
    for name, parameter in theirs.named_parameters():  # biases and LayerNorms away from 0 and 1
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "LayerNorm.weight" in name else 0.0, std=0.2)
    ours = Deberta(ModelConfig.from_dict(config), "nes").eval()
    state = theirs.state_dict()
    if "embeddings.position_embeddings.weight" not in state:
        state["embeddings.position_embeddings.weight"] = ours.embeddings.position_embeddings.weight
    ours.load_state_dict({k: v for k, v in state.items() if "position_ids" not in k}, strict=True)

    input_ids = torch.randint(4, 90, (3, length))
    input_mask = torch.ones_like(input_ids)
    input_mask[1, length // 2 :] = 0
    input_mask[2, -1] = 0
    types = torch.randint(0, 3, (3, length)) if config.get("type_vocab_size") else None
    with torch.no_grad():
        expected = theirs(
            input_ids, input_mask, token_type_ids=types, output_hidden_states=True
        ).hidden_states
        actual = ours(input_ids, input_mask, types)
    real = input_mask > 0
    torch.testing.assert_close(actual.embeddings[real], expected[0][real], atol=1e-5, rtol=1e-5)
    assert len(actual.hidden_states) == len(expected) - 1
    for ours_layer, theirs_layer in zip(actual.hidden_states, expected[1:], strict=True):
        torch.testing.assert_close(ours_layer[real], theirs_layer[real], atol=1e-5, rtol=1e-5)
