"""The last layer at selected positions against the same layer at every position."""

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
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
