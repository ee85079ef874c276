"""The generator's samples in the discriminator's input."""

import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.data.batch import Batch
from DeBERTa.model.pretraining import is_replaced
from tests.conftest import tiny_model
from tests.training.batches import random_batch


def test_corrupted_ids():
    """Samples go to the masked positions in row-major order; nothing else changes."""
    torch.manual_seed(0)
    model, batch = MaskedLanguageModel(ModelConfig.from_dict(tiny_model())).eval(), random_batch()
    masked, corrupted_ids = model.generate(batch)
    assert torch.equal(corrupted_ids[batch.labels > 0], masked.samples)
    assert torch.equal(corrupted_ids[batch.labels == 0], batch.input_ids[batch.labels == 0])
    assert len(masked.samples.unique()) > len(masked.samples) / 2
    assert torch.equal(is_replaced(corrupted_ids, batch.labels), restore(batch) != corrupted_ids)
    assert not is_replaced(restore(batch), batch.labels).any(), (
        "a sample that is the original counts as original"
    )


def restore(batch: Batch) -> torch.Tensor:
    """Return the ids before masking."""
    return torch.where(batch.labels > 0, batch.labels, batch.input_ids)
