"""FLOPs by formula against PyTorch's counter."""

import pytest

pytest.importorskip("transformers", reason="the benchmarks compare with the package transformers")

from benchmarks.training_step import CONFIGS, count_flops, make_batch
from DeBERTa.config import ModelConfig, RTDConfig, read_json
from DeBERTa.model.flops import count_flops_per_token
from tests.conftest import tiny_model


@pytest.mark.parametrize("name", ["rtd_tiny.json", "deberta_tiny.json", "bert_tiny.json"])
def test_formula_agrees_with_the_counter(name):
    """To 3 %: the formula takes exactly 15 % masked positions, and as many table rows as tokens."""
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
    assert both - one == 3 * 2 * 16 * 32 * 2  # p2c: 16 rows, 32 wide, 2 layers
    assert count(conv_kernel_size=3) - both == 3 * 2 * 3 * 32**2
    assert count(relative_attention=False) < one
