"""The last layer at selected positions, and the convolution, against plain formulas."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel
from DeBERTa.model.encoder import ConvLayer
from tests.conftest import select_path, tiny_model
from tests.training.batches import random_batch


@pytest.mark.parametrize("is_biased", [False, True])
def test_last_layer_at_masked_positions_only(is_biased, path):
    """The decoder equals one or two applications of the full last layer, read at the masked positions."""
    torch.manual_seed(4)
    values = tiny_model() | {"initializer_range": 0.3, "position_biased_input": is_biased}
    model = select_path(MaskedLanguageModel(ModelConfig.from_dict(values)).eval(), path)
    batch = random_batch()
    words = model.deberta.embeddings.word_embeddings(batch.input_ids)
    ours = model.lm_predictions.decode(model.deberta, words, batch.input_ids, batch.input_mask, batch.masked)

    out = model.deberta(batch.input_ids, batch.input_mask)
    expected = out.hidden_states[-1]
    if not is_biased:
        everywhere = torch.arange(32).expand(4, 32)
        queries = out.hidden_states[-2] + model.deberta.embeddings.position_embeddings.weight[:32]
        positions = model.deberta.encoder.compute_relative_positions(32)
        layer, is_real = model.deberta.encoder.layer[-1], batch.input_mask > 0
        for _ in range(2):
            queries = layer.decode(queries, everywhere, out.hidden_states[-2], is_real, positions, passes=1)
        expected = queries
    torch.testing.assert_close(ours, expected[batch.labels > 0], atol=1e-5, rtol=1e-5)


def test_decode_everywhere_is_forward(path):
    """With the layer's own input as queries, `decode` at every position is `forward`, but at padding."""
    torch.manual_seed(5)
    values = tiny_model() | {"initializer_range": 0.3}
    model = select_path(MaskedLanguageModel(ModelConfig.from_dict(values)).eval(), path)
    encoder, batch = model.deberta.encoder, random_batch()
    states, is_real = torch.randn(4, 32, 32), batch.input_mask > 0
    positions, everywhere = encoder.compute_relative_positions(32), torch.arange(32).expand(4, 32)
    forward = encoder.layer[0](states, is_real, positions)
    decoded = encoder.layer[0].decode(states, everywhere, states, is_real, positions, passes=1)
    torch.testing.assert_close(decoded[is_real], forward[is_real], atol=1e-5, rtol=1e-5)


def test_too_long_a_sequence_is_reported():
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"position_biased_input": True}))
    batch = random_batch(length=65)
    with pytest.raises(ValueError, match="sequence length 65: max_position_embeddings is 64"):
        model.deberta(batch.input_ids, batch.input_mask)


def test_epsilon_of_all_layer_norms():
    for model in (MaskedLanguageModel, ReplacedTokenDetectionModel):
        config = ModelConfig.from_dict(tiny_model() | {"layer_norm_eps": 0.01, "conv_kernel_size": 3})
        norms = [module for module in model(config).modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) >= 7
        assert {norm.eps for norm in norms} == {0.01}


def test_dropout_in_the_convolution():
    """It comes before the activation, as in the published code: a dropped value is activation(0)."""
    torch.manual_seed(0)
    values = {"conv_kernel_size": 3, "conv_act": "tanh", "hidden_dropout_prob": 0.5}
    layer = ConvLayer(ModelConfig.from_dict(tiny_model() | values)).train()
    with torch.no_grad():
        layer.conv.bias.fill_(-3.0)
    embeddings, first, mask = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    torch.manual_seed(1)
    found = layer(embeddings, first, mask)
    torch.manual_seed(1)
    x = F.conv1d(embeddings.transpose(1, 2), layer.conv.weight, layer.conv.bias, padding=1).transpose(1, 2)
    x = torch.tanh(F.dropout(x.masked_fill(~mask[..., None], 0), 0.5))
    expected = F.layer_norm(first + x, (32,)) * mask[..., None]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
