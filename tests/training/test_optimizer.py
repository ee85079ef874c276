"""Parameter groups, and the compute_lr_factor against its closed form."""

from itertools import pairwise

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.training.optimizer import (
    AdamW,
    build_optimizer,
    compute_gradient_norm,
    compute_lr_factor,
    count_warmup_steps,
    set_learning_rate,
)
from tests.conftest import tiny_model
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
    """Two updates of one weight against the formulas of Loshchilov and Hutter, algorithm 2."""
    model = torch.nn.Linear(1, 1, bias=False)
    weight = model.weight
    torch.nn.init.constant_(weight, 0.5)
    config = train_config(adam_beta1=0.8, adam_beta2=0.95, epsilon=1e-4, weight_decay=0.1)
    optimizer = build_optimizer([(model, 0.01)], config)
    x, m, v = 0.5, 0.0, 0.0
    for t, gradient in ((1, 0.3), (2, -0.7)):
        weight.grad = torch.tensor([[gradient]])
        set_learning_rate(optimizer, 0.5)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        x -= 0.005 * (0.1 * x + (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-4))
    assert weight.item() == pytest.approx(x, rel=1e-5)


SHAPES = [(300, 400), (3, 5, 7), (1,), (), (65_537,), (0, 4), (9,)]


def test_updates_with_clipping(way):
    """Three, against PyTorch's AdamW in float64. The last parameter has no gradient at first. The kernel takes
    gradients of any layout; PyTorch's fused one takes their numbers in the wrong order."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    ours, exact = (
        [torch.nn.Parameter(x.to(kind)) for x in starts] for kind in (torch.float32, torch.float64)
    )
    settings = {"betas": (0.8, 0.95), "eps": 1e-4}
    groups = [
        [{"params": x[:3], "lr": 0.01, "weight_decay": 0.1}, {"params": x[3:], "lr": 0.02}]
        for x in (ours, exact)
    ]
    optimizer, reference = AdamW(groups[0], **settings), torch.optim.AdamW(groups[1], **settings)
    for number, limit in enumerate((0.5, float("inf"), 1e6)):
        for mine, theirs in zip(ours, exact, strict=True):
            if number or mine is not ours[-1]:
                mine.grad = torch.randn_like(mine)
                if mine.dim() == 2 and way == "kernels":
                    mine.grad = mine.grad.t().contiguous().t()
                theirs.grad = mine.grad.double()
        norm = compute_gradient_norm(ours)
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(exact, limit)), rel=1e-6)
        optimizer.clip(norm, limit)
        optimizer.step()
        reference.step()
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
        for name, value in reference.state[theirs].items():
            torch.testing.assert_close(
                optimizer.state[mine][name].double(), value.double(), rtol=1e-5, atol=1e-7
            )


def test_moments_are_those_of_pytorch(monkeypatch):
    """What one way has stored the other goes on from, to the same numbers."""
    torch.manual_seed(1)
    start, gradients = torch.randn(50, 20), torch.randn(4, 50, 20)
    ends = []
    for ways in ((True, True), (True, False), (False, True)):
        weight, state = torch.nn.Parameter(start.clone()), None
        for way, part in zip(ways, gradients.split(2), strict=True):
            with monkeypatch.context() as patch:
                if not way:
                    patch.setattr(kernels, "find", lambda *_: None)
                optimizer = AdamW([{"params": [weight], "lr": 0.1}], (0.9, 0.99), 1e-6)
                if state:
                    optimizer.load_state_dict(state)
                for weight.grad in part:
                    optimizer.step()
                state = optimizer.state_dict()
        ends.append(weight.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_norm_of_large_gradients():
    """Against float64, to 1e-6; PyTorch's own is further off than 1e-4."""
    torch.manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.empty(shape)) for shape in ((20_000, 400), (300,), (2, 3, 4), (7,))
    ]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    exact = torch.stack([p.grad.double().norm() for p in parameters[:-1]]).norm()
    assert compute_gradient_norm(parameters).double() == pytest.approx(float(exact), rel=1e-6)
    assert abs(parameters[0].grad.norm() / parameters[0].grad.double().norm() - 1) > 1e-4
    assert compute_gradient_norm(parameters[-1:]) == 0


def test_the_same_bits_with_any_number_of_threads():
    torch.manual_seed(2)
    start, gradient, results = torch.randn(300, 401), torch.randn(300, 401), []
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        weight = torch.nn.Parameter(start.clone())
        optimizer, weight.grad = AdamW([{"params": [weight]}], (0.9, 0.99), 1e-6), gradient
        norm = compute_gradient_norm([weight])
        optimizer.step()
        results.append((norm, weight.detach()))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_loss_scaler():
    """One that has not been asked to undo its scale does so in the step, and leaves out one that is not finite."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = (
        AdamW([{"params": [weight], "lr": 0.1}], (0.9, 0.99), 1e-6),
        torch.amp.GradScaler("cpu"),
    )
    for scale in (1.0, float("inf")):
        before = weight.detach().clone()
        scaler.scale((weight * scale).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.isfinite().all() and torch.equal(weight, before) == (scale != 1)


def test_graphs_from_before_a_step_are_refused():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = weight.square().sum()
    optimizer, weight.grad = AdamW([{"params": [weight]}], (0.9, 0.99), 1e-6), torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.float64), torch.zeros(6)[::2], torch.zeros(1)])
def test_moments_of_another_kind_are_refused(wrong):
    """A kernel would read past their end."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamW([{"params": [weight]}], (0.9, 0.99), 1e-6)
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = wrong
    with pytest.raises(TypeError, match="moments"):
        optimizer.step()


def test_schedule():
    """Linear up to 1 at the end of warm-up, linear from there to the end value at the last update."""
    factors = [compute_lr_factor(update, 100, 10, 0.2) for update in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.2)
    rise = {round(b - a, 12) for a, b in pairwise(factors[:10])}
    fall = {round(b - a, 12) for a, b in pairwise(factors[9:])}
    assert len(rise) == len(fall) == 1
    assert compute_lr_factor(1, 5, 0, 0.0) == pytest.approx(0.8)
    assert compute_lr_factor(3, 5, 10, 0.0) == pytest.approx(0.3)


def test_warmup_in_steps_or_as_a_proportion():
    assert count_warmup_steps(train_config(warmup=10000.0), 1_000_000) == 10000
    assert count_warmup_steps(train_config(warmup=0.05), 1000) == 50
    assert count_warmup_steps(train_config(warmup=0.0), 1000) == 0
