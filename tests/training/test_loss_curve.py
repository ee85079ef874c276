"""50 steps of a tiny config against a stored loss curve: a change that should not change numbers leaves it alone.

float32, seeded, without dropout; the generator samples. When a change is meant to alter the curve, write it anew with
`python -m tests.training.test_loss_curve` and say why in the commit.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.dataset import BatchPlan, TrainingBatches, derive_step_seed
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.training.metrics import mean_losses
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import GOLDEN, tiny_model, tiny_rtd
from tests.training.batches import train_config

STORED = Path(__file__).with_name("loss_curve.json")
STEPS, SEED = 50, 11
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Processors add in different orders; 50 steps carry float32 rounding up to about 1e-5. A sample that falls the other
# way changes one label of some 500.
TOLERANCE = {"loss": 2e-4, "generator_loss": 2e-4, "discriminator_loss": 5e-3}


def curve(task: str) -> dict[str, list[float]]:
    """Losses of every step of `task` on the golden text (75 lines of 62 tokens)."""
    tokenizer = Tokenizer(GOLDEN / "prepare" / "spm.model")
    with tempfile.TemporaryDirectory() as folder:  # the store keeps its mapping when the folder goes
        text = shutil.copy(GOLDEN / "prepare" / "expected_64.txt", folder)
        store = open_store(Path(text), tokenizer, max_tokens=62, progress=False)
    rtd = task == "RTD"
    config = train_config(
        task_name=task,
        num_training_steps=STEPS,
        warmup=5.0,
        learning_rate=3e-3,
        seed=SEED,
        accumulative_update=2,
    )
    masker = Masker(tokenizer, 1 if rtd else 3, always_mask=rtd)
    batches = TrainingBatches(store, tokenizer, masker, BatchPlan(SEED, batch_size=8, max_seq_length=64))
    torch.manual_seed(SEED)
    if rtd:
        values = tiny_rtd()
        for part in ("generator", "discriminator"):
            values[part] |= NO_DROPOUT
        model = RTDModel(RTDConfig.from_dict(values))
    else:
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | NO_DROPOUT))
    training = (ReplacedTokenStep if rtd else MaskedLMStep)(model, config, "fp32", torch.device("cpu"), STEPS)
    losses: dict[str, list[float]] = {}
    for step in range(STEPS):
        torch.manual_seed(derive_step_seed(SEED, step + 1, 0))
        training.set_learning_rate(step + 1)
        for name, value in mean_losses(training(batches[step])).items():
            if name.endswith("loss"):
                losses.setdefault(name, []).append(round(value, 6))
    return losses


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_loss_curve(task):
    stored = json.loads(STORED.read_text())[task]
    actual = curve(task)
    assert actual.keys() == stored.keys()
    for name, expected in stored.items():
        assert actual[name] == pytest.approx(expected, rel=TOLERANCE[name], abs=TOLERANCE[name]), name
    falling = stored["generator_loss" if task == "RTD" else "loss"]
    assert falling[0] > 7.5 and falling[-1] < falling[0] - 0.5


if __name__ == "__main__":
    STORED.write_text(json.dumps({task: curve(task) for task in ("MLM", "RTD")}, indent=1) + "\n")
