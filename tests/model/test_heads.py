"""The enhanced mask decoder's absolute positions."""

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from tests.conftest import set_threads, tiny_model
from tests.training.batches import random_batch


@pytest.mark.parametrize("threads", [2, 4])
def test_position_gradients_are_the_same_bits_on_several_threads(threads):
    """Every sequence selects the same few positions, whose gradients are added in order."""
    torch.manual_seed(0)
    values = tiny_model() | {"hidden_size": 128, "num_hidden_layers": 1}
    model = MaskedLanguageModel(ModelConfig.from_dict(values)).eval()
    batch = random_batch(rows=96, length=24)
    batch = batch._replace(input_mask=torch.ones_like(batch.input_mask))
    assert batch.masked.positions.numel() * 128 > 2**16  # elements: PyTorch uses one thread for 2^15
    words = model.deberta.embeddings.word_embeddings(batch.input_ids)
    table = model.deberta.embeddings.position_embeddings.weight
    results = []
    with set_threads(threads):
        for _ in range(8):
            hidden = model.lm_predictions.decode(
                model.deberta, words, batch.input_ids, batch.input_mask, batch.masked
            )
            results.append(torch.autograd.grad(hidden.sin().sum(), table, retain_graph=True)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])
