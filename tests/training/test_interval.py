"""Sums between two lines of metrics.jsonl; in full runs they are tested in test_train.py."""

import json
from pathlib import Path

import pytest
import torch

from DeBERTa.training.distributed import get_rank, is_rank_zero
from DeBERTa.training.interval import Interval
from tests.training.ranks import run_ranks


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


def measure_rate(folder: Path) -> None:
    interval = Interval(torch.device("cpu"))
    interval.started -= 100
    interval.add({}, 1000 * (get_rank() + 1), True)
    metrics = interval.finish()
    if is_rank_zero():
        (folder / "rate.json").write_text(json.dumps(metrics))


def test_throughput_is_of_all_ranks(tmp_path):
    run_ranks(2, tmp_path, measure_rate, tmp_path)
    metrics = json.loads((tmp_path / "rate.json").read_text())
    assert metrics["tokens_seen"] == 3000
    assert metrics["tokens_per_second"] == pytest.approx(30, rel=0.1)  # 3,000 tokens in 100 seconds
