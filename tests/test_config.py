"""Configs are strict: a wrong value is named, in one sentence."""

import pytest

from DeBERTa import ModelConfig, RTDConfig, TrainConfig
from DeBERTa.errors import ConfigError
from tests.conftest import TINY, tiny_model, tiny_rtd


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hiden_size": 3}, "hiden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 3}, "attention_head_size"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
        ({"relative_attention": 1}, "relative_attention"),
        ({"pos_att_type": "p2p"}, "pos_att_type"),
        ({"hidden_act": "swiglu"}, "hidden_act"),
        ({"norm_rel_ebd": "rms"}, "norm_rel_ebd"),
        ({"conv_kernel_size": 2}, "conv_kernel_size"),
        ({"position_buckets": 1}, "position_buckets"),
    ],
)
def test_model_config(change, named):
    with pytest.raises(ConfigError, match=named) as error:
        ModelConfig.from_dict(tiny_model() | change, "model.json")
    assert "model.json" in str(error.value)


def test_missing_key():
    values = tiny_model()
    del values["vocab_size"]
    with pytest.raises(ConfigError, match="missing vocab_size"):
        ModelConfig.from_dict(values)


def test_round_trip():
    config = ModelConfig.from_dict(tiny_model())
    assert ModelConfig.from_dict(config.to_dict()) == config
    rtd = RTDConfig.from_dict(tiny_rtd())
    assert RTDConfig.from_dict(rtd.to_dict()) == rtd


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embedding_sharing": "all"}, "embedding_sharing"),
        ({"generator": None}, "generator"),
        ({"extra": 1}, "extra"),
        ({"generator": TINY | {"vocab_size": 3000}}, "vocab_size"),
        ({"generator": TINY | {"hidden_size": 64}}, "embedding_width"),
    ],
)
def test_rtd_config(change, named):
    with pytest.raises(ConfigError, match=named):
        RTDConfig.from_dict(tiny_rtd() | change)


def test_nes_allows_different_widths():
    RTDConfig.from_dict(tiny_rtd("nes") | {"generator": TINY | {"hidden_size": 64}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_config": ""}, "--model_config"),
        ({"do_train": False}, "--do_train"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"accumulative_update": 3}, "--accumulative_update"),
        ({"lr_schedule_ends": 2.0}, "--lr_schedule_ends"),
        ({"max_seq_length": 2}, "--max_seq_length"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"warmup": -1.0}, "--warmup"),
        ({"fp16": True, "precision": "fp32"}, "--fp16"),
        ({"init_generator": "x"}, "--init_generator"),
        ({"task_name": "RTD", "init_model": "x"}, "--init_model"),
    ],
)
def test_train_config(change, named):
    values = {"model_config": "m", "data_dir": "d", "vocab_path": "v", "do_train": True}
    TrainConfig(**values).validate()
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**values | change).validate()
