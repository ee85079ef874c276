"""FLOPs by formula against PyTorch's counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="the benchmarks compare with the package transformers")

from benchmarks.training_step import CONFIGS, count_flops, make_batch
from DeBERTa import MaskedLanguageModel
from DeBERTa.config import ModelConfig, RTDConfig, read_json
from DeBERTa.model.flops import count_flops_per_token
from tests.conftest import tiny_model


@pytest.mark.parametrize("name", ["rtd_tiny.json", "deberta_tiny.json", "bert_tiny.json"])
def test_formula_agrees_with_the_counter(name):
    """To 3 %: the formula takes exactly 15 % masked positions, and all rows of the table."""
    values = read_json(CONFIGS / name)
    config = RTDConfig.from_dict(values) if "generator" in values else ModelConfig.from_dict(values)
    length = min(128, config.models[0].max_position_embeddings)
    batch = make_batch(4, length, 0, config.models[0].vocab_size)
    counted = count_flops(name, "fp32", batch)
    assert count_flops_per_token(config, length) * 4 * length == pytest.approx(counted, rel=0.03)


def test_parts_of_a_model():
    """A convolution, one position term less, and a narrower embedding change the count by what they are."""

    def count(**changes):
        return count_flops_per_token(ModelConfig.from_dict(tiny_model() | changes), 16)

    both, one = count(), count(pos_att_type="c2p")
    assert both - one == 3 * 2 * 31 * 32 * 2  # p2c: 31 rows, 32 wide, 2 layers
    assert count(conv_kernel_size=3) - both == 3 * 2 * 3 * 32**2
    assert count(relative_attention=False) < one


@pytest.mark.parametrize(
    ("changes", "length"),
    [({"position_buckets": -1}, 64), ({"position_buckets": 64}, 32), ({"position_buckets": 16}, 64)],
)
def test_rows_of_the_position_table(changes, length):
    """One per distance, 2 * length - 1, or all of the table; matmuls by the counter."""
    config = ModelConfig.from_dict(tiny_model() | {"max_position_embeddings": 64} | changes)
    deberta = MaskedLanguageModel(config).deberta
    ids = torch.randint(5, 200, (2, length))
    with FlopCounterMode(display=False) as counter:
        deberta(ids, torch.ones_like(ids))
    rows = min(2 * length - 1, 2 * config.position_span)
    width, inner = config.hidden_size, config.intermediate_size
    layer = 8 * width**2 + 4 * width * inner + 4 * length * width + 2 * 2 * rows * width
    tables = 2 * 2 * rows * width**2 / (2 * length)  # projected once per layer, not per token
    found = counter.get_total_flops() / (2 * length) / config.num_hidden_layers - tables
    assert found == pytest.approx(layer, rel=0.02)
    without = count_flops_per_token(dataclasses.replace(config, relative_attention=False), length)
    counted = (count_flops_per_token(config, length) - without) / 3
    assert counted == pytest.approx((config.num_hidden_layers - 1 + (1 + 2 * 0.15) / 2) * 4 * rows * width)
