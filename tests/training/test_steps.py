"""The training step: order of updates, accumulation, clipping, precision."""

import copy

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
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
    return RTDModel(
        RTDConfig.from_dict({k: v | NO_DROPOUT if isinstance(v, dict) else v for k, v in config.items()})
    )


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
    training.set_learning_rate(1)
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
    out = by_hand.generator.masked_loss(batch, sample=True)
    corrupted_ids = corrupt(batch.input_ids, batch.labels, out.samples)
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
        lambda ids, labels, samples: torch.stack([rows[row.tolist().__repr__()] for row in labels]),
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
        training.set_learning_rate(1)
        metrics = mean_losses(training(batch))
        states.append(state(model))
        norms.append(metrics)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert_same(*states, atol=1e-7, rtol=1e-4)


@pytest.mark.usefixtures("way")
def test_clipping():
    model = mlm_model()
    training = MaskedLMStep(model, train_config(max_grad_norm=0.5), "fp32", CPU, total_steps=10)
    seen = {}

    def note_norm(optimizer, *_):
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        seen["norm"] = norm * optimizer.factor

    training.optimizers["model"].register_step_pre_hook(note_norm)
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
        training.set_learning_rate(1)
        torch.manual_seed(0)
        losses[kind] = mean_losses(training(random_batch()))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name in ("generator_loss", "discriminator_loss"):
        assert losses[precision][name] == pytest.approx(losses["fp32"][name], rel=0.01)


def test_fp16_scales_the_loss_and_recovers_from_overflow():
    model = mlm_model()
    training = MaskedLMStep(model, train_config(learning_rate=1e-3), "fp16", CPU, total_steps=10)
    training.set_learning_rate(1)
    before = state(model)
    training.scaler.scale(torch.zeros(1))  # the scaler starts at its first use
    training.scaler.update(2.0**60)  # overflows: the update must be left out and the scale lowered
    training(random_batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert training.scaler.get_scale() < 2.0**60
    training.scaler.update(2.0**10)
    training(random_batch())
    assert not torch.equal(before["lm_predictions.lm_head.bias"], model.lm_predictions.lm_head.bias)


@pytest.mark.parametrize("broken", ["generator", "discriminator"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("sharing", "decoupled"), [("es", True), ("gdes", False), ("gdes", True)])
def test_fp16_overflow_in_one_model_never_spoils_the_other(sharing, decoupled, value, broken):
    """A joint update is left out whole; decoupled, the discriminator's with the generator's but not the reverse."""
    model = rtd_model(sharing)
    config = train_config(task_name="RTD", decoupled_training=decoupled)
    training = ReplacedTokenStep(model, config, "fp16", CPU, total_steps=10)
    training.set_learning_rate(1)
    training.scaler.scale(torch.zeros(1))
    training.scaler.update(16.0)
    name = f"{broken}.deberta.encoder.layer.0.output.dense.weight"
    dict(model.named_parameters())[name].register_hook(lambda gradient: gradient + value)
    before = state(model)
    training(random_batch())
    changed = {
        key.split(".")[0]
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert changed == ({"generator"} if training.is_decoupled and broken == "discriminator" else set())
    assert training.scaler.get_scale() < 16.0


def test_corrupted_ids():
    """Samples go to the masked positions in row-major order; nothing else changes."""
    ids = torch.arange(12).view(2, 6)
    labels = torch.tensor([[0, 7, 0, 0, 8, 0], [9, 0, 0, 0, 0, 0]])
    expected = torch.tensor([[0, 100, 2, 3, 101, 5], [102, 7, 8, 9, 10, 11]])
    assert torch.equal(corrupt(ids, labels, torch.tensor([100, 101, 102])), expected)
    assert torch.equal(corrupt(ids, torch.zeros_like(ids), torch.zeros(0, dtype=torch.long)), ids)


def test_a_batch_without_masks_trains_the_discriminator_only():
    """A corpus of very short lines can give a batch in which nothing is masked."""
    batch = random_batch()
    labels = torch.zeros_like(batch.labels)
    empty = Batch.from_tensors(batch.input_ids, batch.input_mask, labels, batch.uniforms)
    model = rtd_model()
    training = ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    before = state(model)
    metrics = mean_losses(training(empty))
    assert metrics["generator_loss"] == 0 and metrics["discriminator_loss"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    name = "discriminator.mask_predictions.dense.weight"
    assert not torch.equal(before[name], model.state_dict()[name])
