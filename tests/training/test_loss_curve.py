"""50 steps of a tiny config against stored loss curves, which a change that should not change numbers keeps.

float32, seeded; the generator samples. "MLM" and "RTD" have no dropout and hold for every path. With dropout
each path draws masks of its own: PyTorch's, and those of DeBERTa/ops (SplitMix64), with and without kernels.
When a change is meant to alter the curves, run `python -m tests.training.test_loss_curve` and say why in the
commit. It computes all curves and stores those that do not hold.
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
from DeBERTa.training.metrics import average_losses
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import GOLDEN, select_path, tiny_model, tiny_rtd
from tests.training.batches import train_config

STORED = Path(__file__).with_name("loss_curve.json")
STEPS, SEED, DROPOUT = 50, 11, 0.1
CURVES = [(0.0, "plain"), (DROPOUT, "plain"), (DROPOUT, "kernels")]
# Processors add in different orders; 50 steps carry float32 rounding up to about 1e-5. A sample that falls
# the other way changes one label of some 500.
TOLERANCE = {"loss": 2e-4, "generator_loss": 2e-4, "discriminator_loss": 5e-3}


def compute_curve(task: str, path: str, dropout: float) -> dict[str, list[float]]:
    """Return the losses of every step of `task` on the golden text (75 lines of 62 tokens)."""
    tokenizer = Tokenizer(GOLDEN / "prepare" / "spm.model")
    with tempfile.TemporaryDirectory() as folder:  # the store keeps its mapping when the folder goes
        text = shutil.copy(GOLDEN / "prepare" / "expected_64.txt", folder)
        store = open_store(Path(text), tokenizer, max_tokens=62, has_progress=False)
    rtd = task == "RTD"
    config = train_config(
        task_name=task,
        num_training_steps=STEPS,
        warmup=5.0,
        learning_rate=3e-3,
        seed=SEED,
        accumulative_update=2,
    )
    masker = Masker(tokenizer, 1 if rtd else 3, is_always_masked=rtd)
    batches = TrainingBatches(store, tokenizer, masker, BatchPlan(SEED, batch_size=8, max_seq_length=64))
    torch.manual_seed(SEED)
    probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if rtd:
        values = tiny_rtd()
        for part in ("generator", "discriminator"):
            values[part] |= probabilities
        model = RTDModel(RTDConfig.from_dict(values))
    else:
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | probabilities))
    select_path(model, path)
    training = (ReplacedTokenStep if rtd else MaskedLMStep)(model, config, "fp32", torch.device("cpu"), STEPS)
    losses: dict[str, list[float]] = {}
    for step in range(STEPS):
        torch.manual_seed(derive_step_seed(SEED, step + 1, 0))
        training.set_learning_rate(step + 1)
        for name, value in average_losses(training(batches[step])).items():
            if name.endswith("loss"):
                losses.setdefault(name, []).append(round(value, 6))
    return losses


def name_curve(task: str, path: str, dropout: float) -> str:
    """Return the name of the stored curve: paths differ by their dropout masks only."""
    if not dropout:
        return task
    masks = "plain" if path == "plain" else "kernels"
    return f"{task}, dropout {dropout}, {masks}"


def is_equal(actual: dict[str, list[float]], stored: dict[str, list[float]]) -> bool:
    """Return whether two curves agree but for rounding."""
    return actual.keys() == stored.keys() and all(
        actual[name] == pytest.approx(expected, rel=TOLERANCE[name], abs=TOLERANCE[name])
        for name, expected in stored.items()
    )


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_loss_curve(task, path, dropout):
    if path == "sdpa" and dropout:
        pytest.skip("sdpa draws its own dropout masks, for which no curve is stored")
    stored = json.loads(STORED.read_text())[name_curve(task, path, dropout)]
    computed = compute_curve(task, path, dropout)
    assert is_equal(computed, stored)
    falling = computed["generator_loss" if task == "RTD" else "loss"]
    assert falling[0] > 7.5
    assert falling[-1] < falling[0] - 0.5


def store_curves() -> None:
    """Compute all curves and store those that do not hold."""
    curves = json.loads(STORED.read_text())
    for dropout, path in CURVES:
        for task in ("MLM", "RTD"):
            name, curve = name_curve(task, path, dropout), compute_curve(task, path, dropout)
            if not is_equal(curve, curves.get(name, {})):
                curves[name] = curve
    STORED.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    store_curves()
