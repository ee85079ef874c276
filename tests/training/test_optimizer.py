"""Parameter groups, updates, the gradient norm, and the schedule against its closed form."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.training.optimizer import (
    LARGE,
    build_optimizer,
    compute_gradient_norm,
    compute_lr_factor,
    count_warmup_steps,
    describe_schedule,
)
from tests.conftest import set_threads, tiny_model
from tests.training.batches import train_config


def test_biases_and_layer_norms_are_not_decayed():
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    optimizer = build_optimizer([(model, 1e-3)], train_config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all("LayerNorm" in name or name.endswith("bias") for name in plain)
    assert all(parameter.dim() >= 2 for name, parameter in model.named_parameters() if name in decayed)
    assert len(decayed) + len(plain) == len(list(model.parameters()))


def test_update_is_adamw_of_the_paper():
    """Compare two updates of one weight with the formulas of Loshchilov and Hutter, algorithm 2."""
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight
    nn.init.constant_(weight, 0.5)
    config = train_config(adam_beta1=0.8, adam_beta2=0.95, epsilon=1e-4, weight_decay=0.1)
    optimizer = build_optimizer([(model, 0.01)], config)
    x, m, v = 0.5, 0.0, 0.0
    for t, gradient in ((1, 0.3), (2, -0.7)):
        weight.grad = torch.tensor([[gradient]])
        optimizer.param_groups[0]["lr"] = 0.005
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        x -= 0.005 * (0.1 * x + (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-4))
    assert weight.item() == pytest.approx(x, rel=1e-5)


SHAPES = [(300, 400), (3, 5, 7), (1,), (), (65_537,), (0, 4), (9,)]


def test_updates_with_clipping():
    """Compare three updates with AdamW in float64. The last parameter has no gradient at first."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    models = [nn.ParameterList(x.to(kind) for x in starts) for kind in (torch.float32, torch.float64)]
    config = train_config(adam_beta1=0.8, adam_beta2=0.95, epsilon=1e-4, weight_decay=0.1)
    optimizer, reference = (build_optimizer([(model, 0.01)], config) for model in models)
    ours, exact = (list(model) for model in models)
    for number, limit in enumerate((0.5, 0.0, 1e6)):
        for mine, theirs in zip(ours, exact, strict=True):
            if number or mine is not ours[-1]:
                mine.grad = torch.randn_like(mine)
                theirs.grad = mine.grad.double()
        norm = compute_gradient_norm(ours)
        expected = torch.nn.utils.clip_grad_norm_(exact, limit or float("inf"))
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        nn.utils.clip_grads_with_norm_(ours, limit or float("inf"), norm)
        optimizer.step()
        reference.step()
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
        for name, value in reference.state[theirs].items():
            torch.testing.assert_close(
                optimizer.state[mine][name].double(), value.double(), rtol=1e-5, atol=1e-7
            )


def test_norm_of_large_gradients():
    """Compare with float64, to 1e-6; PyTorch's own is further off than 1e-4."""
    torch.manual_seed(0)
    shapes = ((20_000, 400), (300,), (2, 3, 4), (7,))
    parameters = [nn.Parameter(torch.empty(shape)) for shape in shapes]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    exact = torch.stack([p.grad.double().norm() for p in parameters[:-1]]).norm()
    assert compute_gradient_norm(parameters).double() == pytest.approx(float(exact), rel=1e-6)
    assert abs(parameters[0].grad.norm() / parameters[0].grad.double().norm() - 1) > 1e-4
    assert compute_gradient_norm(parameters[-1:]) == 0


def test_norm_of_a_long_vector():
    """A gradient of one dimension has no rows to sum."""
    parameter = nn.Parameter(torch.empty(LARGE + 1))
    parameter.grad = torch.full_like(parameter, 2.0)
    assert compute_gradient_norm([parameter]) == pytest.approx(2 * (LARGE + 1) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_updates_repeat_bit_for_bit(threads):
    torch.manual_seed(2)
    start, gradient, results = torch.randn(300, 401), torch.randn(300, 401), []
    with set_threads(threads):
        for _ in range(3):
            model = nn.ParameterList([start.clone()])
            optimizer = build_optimizer([(model, 0.1)], train_config())
            model[0].grad = gradient.clone()
            norm = compute_gradient_norm(list(model))
            nn.utils.clip_grads_with_norm_(list(model), 1.0, norm)
            optimizer.step()
            results.append((norm, model[0].detach()))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_loss_scaler():
    """A step that was not unscaled before is unscaled in the update, and skipped where not finite."""
    model = nn.ParameterList([torch.ones(4)])
    (weight,) = model
    optimizer, scaler = build_optimizer([(model, 0.1)], train_config()), torch.amp.GradScaler("cpu")
    for scale in (1.0, float("inf")):
        before = weight.detach().clone()
        scaler.scale((weight * scale).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.isfinite().all()
        assert torch.equal(weight, before) == (scale != 1)


def test_schedule():
    """Linear up to 1 at the end of warm-up, linear from there to the end value at the last update."""
    config = train_config(warmup=10.0, lr_schedule_ends=0.2)
    factors = [compute_lr_factor(update, 100, config) for update in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.2)
    rise = {round(b - a, 12) for a, b in pairwise(factors[:10])}
    fall = {round(b - a, 12) for a, b in pairwise(factors[9:])}
    assert len(rise) == len(fall) == 1
    assert compute_lr_factor(1, 5, train_config(warmup=0.0)) == pytest.approx(0.8)
    assert compute_lr_factor(3, 5, train_config(warmup=10.0)) == pytest.approx(0.3)


def test_other_schedules():
    """All rise as the linear one does; then half a cosine, a line over the last tenth, or nothing."""

    def list_factors(schedule: str, end: float = 0.0) -> list[float]:
        config = train_config(warmup=10.0, lr_schedule=schedule, lr_schedule_ends=end)
        return [compute_lr_factor(update, 100, config) for update in range(1, 101)]

    for schedule in ("cosine", "wsd", "constant"):
        assert list_factors(schedule)[:10] == list_factors("linear")[:10]
    cosine = list_factors("cosine", 0.2)
    assert (cosine[54], cosine[99]) == pytest.approx((0.6, 0.2))
    assert [a + b for a, b in zip(cosine[9:], cosine[:8:-1], strict=True)] == pytest.approx([1.2] * 91)
    assert list_factors("wsd")[9:90] == [1.0] * 81
    assert list_factors("wsd")[90:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert list_factors("constant")[9:] == [1.0] * 91


@pytest.mark.parametrize("total", range(1, 13))
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_short_runs_end_at_the_end_value(schedule, total):
    config = train_config(warmup=0.0, lr_schedule=schedule, lr_schedule_ends=0.25)
    assert compute_lr_factor(total, total, config) == pytest.approx(0.25)


@pytest.mark.parametrize(("warmup", "start"), [(10.0, 90), (95.0, 95)])
def test_wsd_is_described(warmup, start):
    config = train_config(warmup=warmup, lr_schedule="wsd")
    assert f"linear decay from step {start} to 0" in describe_schedule(config, 100)
    factors = [compute_lr_factor(update, 100, config) for update in range(1, 101)]
    assert [number for number, factor in enumerate(factors, 1) if factor == 1.0][-1] == start


def test_warmup_in_steps_or_as_a_proportion():
    assert count_warmup_steps(10000.0, 1_000_000) == 10000
    assert count_warmup_steps(0.05, 1000) == 50
    assert count_warmup_steps(0.0, 1000) == 0
    assert count_warmup_steps(1.0, 1000) == 1
    assert count_warmup_steps(0.999, 1000) == 999
