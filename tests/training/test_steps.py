"""The training step: order of updates, accumulation, clipping, precision."""

import copy

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.training.metrics import average_losses
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import select_path, set_threads, tiny_model, tiny_rtd
from tests.training.batches import random_batch, train_config

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CPU = torch.device("cpu")


def build_mlm() -> MaskedLanguageModel:
    torch.manual_seed(0)
    return MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | NO_DROPOUT))


def build_rtd(sharing: str = "gdes") -> RTDModel:
    torch.manual_seed(0)
    config = tiny_rtd(sharing)
    return RTDModel(
        RTDConfig.from_dict({k: v | NO_DROPOUT if isinstance(v, dict) else v for k, v in config.items()})
    )


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(ours: dict, theirs: dict, **tolerance) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("changed", [{"decoupled_training": False}, {}], ids=["joint", "es"])
def test_rates_of_a_joint_update(changed):
    """One optimizer, in which each model has its own rate."""
    model = build_rtd() if changed else RTDModel(RTDConfig.from_dict(tiny_rtd("es")))
    config = train_config(task_name="RTD", learning_rate=1e-2, discriminator_learning_rate=2e-3, **changed)
    training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
    (optimizer,) = training.optimizers.values()
    rates = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    generator = {id(parameter) for parameter in model.generator.parameters()}
    assert {rate for number, rate in rates.items() if number in generator} == {1e-2}
    assert {rate for number, rate in rates.items() if number not in generator} == {2e-3}


def test_decoupled_step_by_hand():
    """Generator update, then the discriminator on samples from before it and tables from after it."""
    model = build_rtd()
    by_hand = copy.deepcopy(model)
    config = train_config(task_name="RTD", learning_rate=1e-2, discriminator_learning_rate=2e-3, warmup=0.0)
    training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    batch = random_batch()
    torch.manual_seed(5)
    training(batch)

    def optimize(part, loss, rate):
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
    masked, corrupted_ids = by_hand.generator.generate(batch)
    optimize(by_hand.generator, masked.loss.mean(), 1e-2 * 0.9)
    detected = by_hand.discriminate(corrupted_ids, batch.input_mask, batch.labels)
    optimize(by_hand.discriminator, 10 * detected.loss.mean(), 2e-3 * 0.9)
    # An update is about the learning rate; gradients near zero make its sign a matter of rounding.
    for name, tensor in model.state_dict().items():
        difference = (tensor - by_hand.state_dict()[name]).abs()
        assert difference.median() < 1e-6, name
        assert (difference > 1e-4).float().mean() < 0.01, name


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("decoupled", [True, False])
def test_accumulation_changes_nothing(micro_batches, decoupled):
    """Micro-batches with different target counts give the gradient of the batch."""
    batch = random_batch(rows=8)
    assert len(set((batch.labels > 0).sum(1).view(micro_batches, -1).sum(1).tolist())) > 1
    states, norms = [], []
    for accumulative_update in (1, micro_batches):
        model = build_rtd()
        config = train_config(
            task_name="RTD",
            accumulative_update=accumulative_update,
            decoupled_training=decoupled,
            train_batch_size=8,
            epsilon=1e-2,  # keeps the update proportional to small gradients, so that rounding stays rounding
        )
        training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
        training.set_learning_rate(1)
        norms.append(average_losses(training(batch)))
        states.append(copy_state(model))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert_same(*states, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_clipping(limit):
    """The reported norm is that before clipping; 0 does not clip."""
    model = build_mlm()
    training = MaskedLMStep(model, train_config(max_grad_norm=limit), "fp32", CPU, total_steps=10)
    seen = []

    def record_norm(*_: object) -> None:
        seen.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    training.optimizers["model"].register_step_pre_hook(record_norm)
    reported = training(random_batch())["grad_norm"]
    assert reported > 0.5
    assert seen == [pytest.approx(limit or float(reported), rel=1e-3)]


def test_gradients_have_the_layout_of_their_parameters(path):
    """PyTorch's fused AdamW on a CPU reads gradients as they lie in memory."""
    model = select_path(build_rtd(), path)
    training = ReplacedTokenStep(model, train_config(task_name="RTD"), "bf16", CPU, total_steps=10)
    strides = {}

    def record_strides(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                strides[parameter] = parameter.grad.stride()

    for optimizer in training.optimizers.values():
        optimizer.register_step_pre_hook(record_strides)
    training(random_batch())
    assert len(strides) > 40
    assert all(parameter.stride() == stride for parameter, stride in strides.items())


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_step_on_two_threads_repeats_bit_for_bit(path, decoupled):
    """With dropout, sampling, and [MASK] in every sequence, for tables and batches that two threads share."""
    values = tiny_rtd()
    for part in ("generator", "discriminator"):
        values[part] |= {"hidden_size": 64, "intermediate_size": 128}
    batch = random_batch(rows=64, length=48)
    assert batch.masked.positions.numel() * 64 > 2**15  # elements: PyTorch uses one thread for fewer
    config = train_config(task_name="RTD", decoupled_training=decoupled, learning_rate=1e-3)
    states = []
    with set_threads(2):
        for _ in range(2):
            torch.manual_seed(0)
            model = select_path(RTDModel(RTDConfig.from_dict(values)), path)
            training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
            training.set_learning_rate(1)
            sums = [training(batch) for _ in range(2)]
            states.append(
                copy_state(model) | {f"sum {n} {k}": v for n, s in enumerate(sums) for k, v in s.items()}
            )
    first, second = states
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(precision):
    """Weights stay float32; losses agree to the format's rounding (8 or 11 bits, a few layers)."""
    losses = {}
    for kind in ("fp32", precision):
        model = build_rtd()
        training = ReplacedTokenStep(model, train_config(task_name="RTD"), kind, CPU, total_steps=10)
        training.set_learning_rate(1)
        torch.manual_seed(0)
        losses[kind] = average_losses(training(random_batch()))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name in ("generator_loss", "discriminator_loss"):
        assert losses[precision][name] == pytest.approx(losses["fp32"][name], rel=0.01)


def test_fp16_scales_the_loss_and_recovers_from_overflow():
    model = build_mlm()
    training = MaskedLMStep(model, train_config(learning_rate=1e-3), "fp16", CPU, total_steps=10)
    training.set_learning_rate(1)
    before = copy_state(model)
    training.scaler.scale(torch.zeros(1))  # the scaler starts at its first use
    training.scaler.update(2.0**60)  # overflows: the update must be skipped and the scale lowered
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
    """A joint update is skipped; decoupled, the discriminator's with the generator's, not the reverse."""
    model = build_rtd(sharing)
    config = train_config(task_name="RTD", decoupled_training=decoupled)
    training = ReplacedTokenStep(model, config, "fp16", CPU, total_steps=10)
    training.set_learning_rate(1)
    training.scaler.scale(torch.zeros(1))
    training.scaler.update(16.0)
    name = f"{broken}.deberta.encoder.layer.0.output.dense.weight"
    dict(model.named_parameters())[name].register_hook(lambda gradient: gradient + value)
    before = copy_state(model)
    training(random_batch())
    changed = {
        key.split(".")[0]
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert changed == ({"generator"} if training.is_decoupled and broken == "discriminator" else set())
    assert training.scaler.get_scale() < 16.0


def test_a_batch_without_masks_trains_the_discriminator_only():
    """A corpus of very short lines can give a batch in which nothing is masked."""
    batch = random_batch()
    labels = torch.zeros_like(batch.labels)
    empty = Batch.from_tensors(batch.input_ids, batch.input_mask, labels, batch.uniforms)
    model = build_rtd()
    training = ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    before = copy_state(model)
    metrics = average_losses(training(empty))
    assert metrics["generator_loss"] is None
    assert metrics["discriminator_loss"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    name = "discriminator.mask_predictions.dense.weight"
    assert not torch.equal(before[name], model.state_dict()[name])
