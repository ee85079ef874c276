"""The training step: order of updates, accumulation, clipping, precision."""

import copy

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.model.pretraining import corrupt
from DeBERTa.training.metrics import mean_losses
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import random_batch, train_config

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CPU = torch.device("cpu")


def mlm_model() -> MaskedLanguageModel:
    torch.manual_seed(0)
    return MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | NO_DROPOUT))


def rtd_model(sharing: str = "gdes") -> RTDModel:
    torch.manual_seed(0)
    config = tiny_rtd(sharing)
    return RTDModel(RTDConfig.from_dict({k: v | NO_DROPOUT if isinstance(v, dict) else v for k, v in config.items()}))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(ours: dict, theirs: dict, **tolerance) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_decoupled_step_by_hand():
    """Generator update, then the discriminator on samples from before it and tables from after it."""
    model = rtd_model()
    by_hand = copy.deepcopy(model)
    config = train_config(task_name="RTD", learning_rate=1e-2, discriminator_learning_rate=2e-3, warmup=0.0)
    training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
    training.learning_rate(1)
    batch = random_batch()
    torch.manual_seed(5)
    training(batch)

    def optimise(part, loss, rate):
        names, parameters = zip(*part.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        for name, p, g in zip(names, parameters, gradients, strict=True):
            if g is None:
                continue
            g = g * min(1.0, 1.0 / (float(norm) + 1e-6))
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.01
            with torch.no_grad():  # AdamW's first update: both moments, corrected for bias, are g and g * g
                p -= rate * (g / (g.abs() + 1e-6) + decay * p)

    torch.manual_seed(5)
    out = by_hand.generator(batch.input_ids, batch.input_mask, batch.labels)
    corrupted_ids = corrupt(batch.input_ids, batch.labels, out.logits)
    optimise(by_hand.generator, out.loss.mean(), 1e-2 * 0.9)
    found = by_hand.discriminate(corrupted_ids, batch.input_mask, batch.labels)
    optimise(by_hand.discriminator, 10 * found.loss.mean(), 2e-3 * 0.9)
    # An update is about the learning rate; gradients near zero make its sign a matter of rounding.
    for name, tensor in model.state_dict().items():
        difference = (tensor - by_hand.state_dict()[name]).abs()
        assert difference.median() < 1e-6, name
        assert (difference > 1e-4).float().mean() < 0.01, name


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("decoupled", [True, False])
def test_accumulation_changes_nothing(parts, decoupled, monkeypatch):
    """Parts with different numbers of targets give the whole batch's gradient: losses are sums over global counts."""
    batch = random_batch(rows=8)
    targets = (batch.labels > 0).sum(1)
    corrupted = torch.where(batch.labels > 0, (batch.labels * 7) % 1900 + 4, batch.input_ids)
    assert len(set(targets.view(parts, -1).sum(1).tolist())) > 1
    # Samples depend on the order of draws, so both runs get the same made-up ones.
    rows = {row.tolist().__repr__(): filled for row, filled in zip(batch.labels, corrupted, strict=True)}
    monkeypatch.setattr(
        "DeBERTa.training.steps.corrupt",
        lambda ids, labels, logits: torch.stack([rows[row.tolist().__repr__()] for row in labels]),
    )
    states, norms = [], []
    for accumulative_update in (1, parts):
        model = rtd_model()
        config = train_config(
            task_name="RTD",
            accumulative_update=accumulative_update,
            decoupled_training=decoupled,
            train_batch_size=8,
            epsilon=1e-2,  # keeps the update proportional to small gradients, so that rounding stays rounding
        )
        training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
        training.learning_rate(1)
        metrics = mean_losses(training(batch))
        states.append(state(model))
        norms.append(metrics)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert_same(*states, atol=1e-7, rtol=1e-4)


def test_clipping():
    model = mlm_model()
    training = MaskedLMStep(model, train_config(max_grad_norm=0.5), "fp32", CPU, total_steps=10)
    seen = {}

    def gradient_norm(*_):
        seen["norm"] = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()

    training.optimizers["model"].register_step_pre_hook(gradient_norm)
    reported = training(random_batch())["grad_norm"]
    assert reported > 0.5
    assert seen["norm"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(precision):
    """Weights stay float32; losses of one batch agree to the format's rounding (8 or 11 bits, a few layers)."""
    losses = {}
    for kind in ("fp32", precision):
        model = rtd_model()
        training = ReplacedTokenStep(model, train_config(task_name="RTD"), kind, CPU, total_steps=10)
        training.learning_rate(1)
        torch.manual_seed(0)
        losses[kind] = mean_losses(training(random_batch()))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name in ("generator_loss", "discriminator_loss"):
        assert losses[precision][name] == pytest.approx(losses["fp32"][name], rel=0.01)


def test_fp16_scales_the_loss_and_recovers_from_overflow():
    model = mlm_model()
    training = MaskedLMStep(model, train_config(learning_rate=1e-3), "fp16", CPU, total_steps=10)
    training.learning_rate(1)
    before = state(model)
    training.scaler.scale(torch.zeros(1))  # the scaler starts at its first use
    training.scaler.update(2.0**60)  # overflows: the update must be left out and the scale lowered
    training(random_batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert training.scaler.get_scale() < 2.0**60
    training.scaler.update(2.0**10)
    training(random_batch())
    assert not torch.equal(before["lm_predictions.lm_head.bias"], model.lm_predictions.lm_head.bias)


def test_samples_follow_the_generators_distribution():
    """Chi-square of 200,000 samples against the softmax."""
    torch.manual_seed(2)
    logits = torch.randn(1, 50) * 1.5
    count = 200_000
    ids = torch.full((1, count), 60)
    labels = torch.ones_like(ids)
    samples = corrupt(ids, labels, logits.expand(count, -1))
    expected = torch.softmax(logits[0], -1) * count
    observed = torch.bincount(samples[0], minlength=50)
    assert ((observed - expected) ** 2 / expected).sum() < 85.4  # 0.1 % of true samples exceed this (49 degrees)
    untouched = corrupt(ids, torch.zeros_like(ids), logits[:0])
    assert torch.equal(untouched, ids)
