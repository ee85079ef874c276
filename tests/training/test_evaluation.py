"""Evaluation metrics against naive counts."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.dataset import BatchPlan, EvaluationBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.model.pretraining import is_replaced
from DeBERTa.train import count_tokens
from DeBERTa.training.evaluation import (
    compute_detection_metrics,
    compute_recall_at_precision,
    compute_roc_auc,
    evaluate,
)
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import train_config

CPU = torch.device("cpu")


def compute_naive_auc(scores, replaced):
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[replaced] for b in scores[~replaced]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(seed):
    generator = np.random.default_rng(seed)
    scores = np.round(generator.normal(size=120), 1).astype(np.float32)  # rounding makes ties
    replaced = generator.random(120) < 0.2
    assert compute_roc_auc(scores, replaced) == pytest.approx(compute_naive_auc(scores, replaced), abs=1e-12)


def test_auc_extremes():
    scores, replaced = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert compute_roc_auc(scores, replaced) == 1.0
    assert compute_roc_auc(-scores, replaced) == 0.0
    assert compute_roc_auc(np.zeros(4), replaced) == 0.5
    assert compute_roc_auc(scores, np.zeros(4, bool)) is None
    assert compute_roc_auc(scores, np.ones(4, bool)) is None


@pytest.mark.parametrize("precision", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_recall_at_precision_against_scikit_learn(seed, precision):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    replaced = generator.random(300) < 0.2
    scores = np.round(generator.normal(size=300) + seed / 2 * replaced, 1).astype(np.float32)  # with ties
    precisions, recalls, _ = metrics.precision_recall_curve(replaced, scores)
    expected = recalls[precisions >= precision].max()
    assert compute_recall_at_precision(scores, replaced, precision) == pytest.approx(expected, abs=1e-12)


def test_recall_at_precision_extremes():
    scores, replaced = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert compute_recall_at_precision(scores, replaced, 1.0) == 1.0
    assert compute_recall_at_precision(-scores, replaced, 0.6) == 0.0
    assert compute_recall_at_precision(-scores, replaced, 0.5) == 1.0
    assert compute_recall_at_precision(np.zeros(4), np.arange(4) == 0, 0.5) == 0.0
    assert compute_recall_at_precision(scores, np.zeros(4, bool), 0.5) is None


def test_precision_and_recall():
    scores = np.array([2.0, 1.0, -1.0, 3.0, -2.0, -3.0])
    replaced = np.array([True, False, True, True, False, False])
    metrics = compute_detection_metrics(scores, replaced)
    assert metrics["discriminator_accuracy"] == pytest.approx(4 / 6)
    assert metrics["discriminator_precision"] == pytest.approx(2 / 3)
    assert metrics["discriminator_recall"] == pytest.approx(2 / 3)
    assert metrics["discriminator_recall_at_precision_50"] == 1
    assert metrics["discriminator_replaced"] == pytest.approx(3 / 6)


def test_a_discriminator_that_always_predicts_original():
    """It is measured against the larger class; its precision is undefined, not zero."""
    metrics = compute_detection_metrics(np.full(20, -3.0), np.arange(20) < 3)
    assert metrics["discriminator_accuracy"] == metrics["discriminator_majority_accuracy"] == 0.85
    assert metrics["discriminator_precision"] is None
    assert metrics["discriminator_recall"] == 0
    assert metrics["discriminator_replaced_entropy"] == pytest.approx(
        -0.15 * np.log(0.15) - 0.85 * np.log(0.85)
    )
    metrics = compute_detection_metrics(np.full(20, -3.0), np.zeros(20, bool))
    assert metrics["discriminator_recall"] is None
    assert metrics["discriminator_auc"] is None
    assert math.copysign(1, metrics["discriminator_replaced_entropy"]) == 1  # 0, not -0


@pytest.fixture(scope="module")
def store(prepared, tokenizer):
    return open_store(prepared / "valid.txt", tokenizer, max_tokens=62)


def make_batches(store, tokenizer, rtd, size):
    return EvaluationBatches(
        store, tokenizer, Masker(tokenizer, 1, is_always_masked=rtd), BatchPlan(1, size, 64)
    )


def test_masked_lm_is_a_mean_over_tokens_for_any_batch_size(store, tokenizer):
    torch.manual_seed(0)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"initializer_range": 0.3}))
    training = MaskedLMStep(model, train_config(), "fp32", CPU, total_steps=10)
    results = [
        evaluate(training, list(make_batches(store, tokenizer, False, size)), num_counted=6)
        for size in (7, 40)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    model.eval()
    with torch.no_grad():
        full = make_batches(store, tokenizer, False, 40)[0].to(torch.device("cpu"))
        out = model(full.input_ids, full.input_mask, full.labels)
    assert results[0]["loss"] == pytest.approx(F.cross_entropy(out.logits, out.labels).item(), rel=1e-5)
    assert results[0]["accuracy"] == pytest.approx(
        (out.logits.argmax(-1) == out.labels).float().mean().item()
    )
    assert results[0]["perplexity"] == pytest.approx(np.exp(results[0]["loss"]))


def build_step(model: RTDModel) -> ReplacedTokenStep:
    return ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_detection_loss_is_a_mean_over_tokens(tokenizer, sample_ids, tmp_path, size):
    """Padding does not count, whatever the batch size."""
    generator, first, text = np.random.default_rng(0), 0, ""
    for length in generator.integers(3, 61, 40):
        text += " ".join(tokenizer.pieces[i] for i in sample_ids[first : first + length]) + "\n"
        first += length
    (tmp_path / "valid.txt").write_text(text, encoding="utf-8")
    batches = list(make_batches(open_store(tmp_path / "valid.txt", tokenizer, 62), tokenizer, True, size))
    torch.manual_seed(0)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd())).eval()
    found = evaluate(build_step(model), batches, num_counted=-(-40 // size))
    losses, tokens, shared = 0.0, 0, model.get_shared_tables()
    with torch.no_grad():
        for batch in (batch.to(CPU) for batch in batches):
            (_, corrupted_ids), _ = model(batch)
            real = batch.input_mask > 0
            labels = is_replaced(corrupted_ids, batch.labels)[real].float()
            logits = model.discriminator.compute_logits(corrupted_ids, batch.input_mask, shared)
            losses += F.binary_cross_entropy_with_logits(logits[real], labels, reduction="sum").item()
            tokens += int(real.sum())
    assert found["discriminator_loss"] == pytest.approx(losses / tokens, rel=1e-4)


def test_rarity_of_tokens_alone(prepared, store, tokenizer):
    torch.manual_seed(0)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    train = open_store(prepared / "train.txt", tokenizer, max_tokens=62)
    counts = count_tokens(train, tokenizer, 2008)
    assert counts[tokenizer.cls_id] == counts[tokenizer.sep_id] == len(train)  # one per line
    data = list(make_batches(store, tokenizer, True, 16))[:2]
    found = evaluate(build_step(model), data, 2, counts)
    original, replaced = [], []  # counts of the tokens that the discriminator sees
    with torch.no_grad():
        for batch in data:
            batch = batch.to(torch.device("cpu"))
            generated, detected = model.eval()(batch, is_per_token=True)
            for token, label in zip(
                generated.corrupted_ids[batch.input_mask > 0].tolist(), detected.labels.tolist(), strict=True
            ):
                (replaced if label else original).append(counts[token])
    better = sum((r < o) + (r == o) / 2 for r in replaced for o in original)
    assert found["discriminator_rarity_auc"] == pytest.approx(better / len(replaced) / len(original))
    # A fresh generator draws from all pieces alike, most of which are rare.
    assert found["discriminator_rarity_auc"] > 0.8


def test_rtd_evaluation_is_repeatable_and_restores_the_mode(store, tokenizer):
    torch.manual_seed(0)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd())).train()
    data = list(make_batches(store, tokenizer, True, 16))
    first, second = (evaluate(build_step(model), data, len(data)) for _ in range(2))
    assert first == second
    assert model.training
    assert first["generator_loss"] == pytest.approx(np.log(2008), rel=0.01)
    # A fresh generator hardly ever samples the original: nearly all masked tokens are replaced.
    assert first["discriminator_replaced"] == pytest.approx(0.15 * 62 / 64, rel=0.1)
