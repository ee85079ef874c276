"""The generator's samples in the discriminator's input."""

import pytest
import torch
from torch import nn

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.model.pretraining import is_replaced
from tests.conftest import tiny_model, tiny_rtd
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


@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_initial_weights(task, std):
    """Those of Linear and Embedding are normal with `initializer_range`, biases and GDES residuals zero."""
    torch.manual_seed(0)
    changed = {"initializer_range": std}
    if task == "MLM":
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | changed))
    else:
        rtd = tiny_rtd()
        parts = {name: rtd[name] | changed for name in ("generator", "discriminator")}
        model = RTDModel(RTDConfig.from_dict(rtd | parts))
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() >= 1000:
            number, seen = module.weight.numel(), seen + 1
            assert abs(module.weight.std().item() - std) < 5 * std / (2 * number) ** 0.5, name
            assert abs(module.weight.mean().item()) < 5 * std / number**0.5, name
    assert seen > 5
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "_weight")):
            assert not parameter.any(), name


def restore(batch: Batch) -> torch.Tensor:
    """Return the ids before masking."""
    return torch.where(batch.labels > 0, batch.labels, batch.input_ids)
