"""Parameter groups, and the schedule against its closed form."""

from itertools import pairwise

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.training.optimizer import build_optimizer, schedule, set_learning_rate, warmup_steps
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


def test_schedule():
    """Linear up to 1 at the end of warm-up, linear from there to the end value at the last update."""
    factors = [schedule(update, 100, 10, 0.2) for update in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.2)
    rise = {round(b - a, 12) for a, b in pairwise(factors[:10])}
    fall = {round(b - a, 12) for a, b in pairwise(factors[9:])}
    assert len(rise) == len(fall) == 1
    assert schedule(1, 5, 0, 0.0) == pytest.approx(0.8)
    assert schedule(3, 5, 10, 0.0) == pytest.approx(0.3)


def test_warmup_in_steps_or_as_a_proportion():
    assert warmup_steps(train_config(warmup=10000.0), 1_000_000) == 10000
    assert warmup_steps(train_config(warmup=0.05), 1000) == 50
    assert warmup_steps(train_config(warmup=0.0), 1000) == 0
