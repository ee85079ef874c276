"""Sums between two lines of metrics.jsonl; in full runs they are tested in test_train.py."""

import torch

from DeBERTa.training.interval import Interval


def make_sums(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_gradient_norms_are_of_the_last_step():
    """A step that skips the generator's update has none of the discriminator: no older one is logged."""
    interval = Interval(torch.device("cpu"))
    interval.add(
        make_sums(loss=4.0, targets=2.0, generator_grad_norm=1.5, discriminator_grad_norm=3.5), 8, True
    )
    interval.add(make_sums(loss=9.0, targets=1.0, generator_grad_norm=float("inf")), 8, False)
    again = Interval(torch.device("cpu"))
    again.load_state_dict(interval.state_dict())
    for each in (interval, again):
        metrics = each.finish()
        assert metrics["generator_grad_norm"] == float("inf")
        assert "discriminator_grad_norm" not in metrics
        assert metrics["loss"] == 2.0  # of the finite step
        assert metrics["tokens_seen"] == 16
    assert not interval.norms
