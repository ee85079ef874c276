"""Configs are strict: a wrong value is named, in one sentence. Metadata says what else holds for flags."""

import dataclasses
import json
import math

import pytest
from transformers import DebertaV2Config

from DeBERTa import ModelConfig, RTDConfig, TrainConfig
from DeBERTa.config import FREE_PER_NODE, FREE_TO_CHANGE, Bounds
from DeBERTa.errors import ConfigError
from tests.conftest import TINY, tiny_model, tiny_rtd

PATHS = {"model_config": "m", "data_dir": "d", "vocab_path": "v"}


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


def test_heads_follow_from_the_width():
    """Unless `attention_head_size` is given: such a model is built, and reported."""
    config = ModelConfig.from_dict(tiny_model() | {"hidden_size": 96, "num_attention_heads": 3})
    assert (config.attention_head_size, config.describe_unusual_heads()) == (32, "")
    config = ModelConfig.from_dict(config.to_dict() | {"attention_head_size": 64})
    assert config.describe_unusual_heads().startswith(
        "attention_head_size 64 makes 3 heads 192 wide, but hidden_size is 96; "
    )


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


def test_configs_of_the_hub(tmp_path):
    """What transformers adds is dropped, lists of position terms are read; other unknown keys are refused."""
    hub = TINY | {
        "model_type": "deberta-v2", "architectures": ["DebertaV2Model"], "pad_token_id": 0, "legacy": True,
        "pooler_hidden_size": 32, "transformers_version": "5.23.0", "torch_dtype": "float16",
    }  # fmt: skip
    for terms, expected in ((["p2c", "c2p"], "p2c|c2p"), (["c2p"], "c2p"), ([], "none"), (None, "none")):
        (tmp_path / "config.json").write_text(json.dumps(hub | {"pos_att_type": terms}))
        config = ModelConfig.from_json(tmp_path / "config.json")
        assert config == ModelConfig.from_dict(TINY | {"pos_att_type": expected})
    for change, named in (
        ({"hiden_size": 3}, "hiden_size"),
        ({"model_type": "bert"}, 'model_type is "bert"'),
        ({"model_type": ["bert"]}, "model_type is"),
        ({"pos_att_type": [3]}, "pos_att_type must be str"),
        ({"pos_att_type": {"c2p": 1}}, "pos_att_type must be str"),
    ):
        with pytest.raises(ConfigError, match=named):
            ModelConfig.from_dict(hub | change)


def test_a_config_that_transformers_wrote(tmp_path):
    config = DebertaV2Config(
        hidden_size=64, num_attention_heads=4, pos_att_type=["c2p"], relative_attention=True
    )
    config.save_pretrained(tmp_path)
    read = ModelConfig.from_json(tmp_path / "config.json")
    assert (read.hidden_size, read.position_terms, read.vocab_size) == (64, ("c2p",), 128100)


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
        ({"lr_schedule": "constant", "lr_schedule_ends": 0.1}, "--lr_schedule constant"),
        ({"max_seq_length": 2}, "--max_seq_length"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"warmup": -1.0}, "--warmup"),
        ({"fp16": True, "precision": "fp32"}, "--fp16"),
        ({"init_generator": "x"}, "--init_generator"),
        ({"task_name": "RTD", "init_generator": "x"}, "--init_discriminator"),
        ({"task_name": "GPT"}, "--task_name must be one of MLM, RTD, not 'GPT'"),
        ({"learning_rate": float("nan")}, "--learning_rate must be above 0.0 and at most 1e.30, not nan"),
        ({"replay_share": 0.99999}, "--replay_share must be at least 0.0001 and at most 0.9999, not 0.99999"),
        ({"replay_share": 4e-5}, "--replay_share must be at least 0.0001"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be at least 0.0 and below 1.0, not 1.0"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs"),
        ({"nproc_per_node": 300}, "--train_batch_size 256 is too small for --nproc_per_node 300"),
        ({"workers": 10_000}, "--workers must be at least 0 and at most 1024"),
        ({"num_training_steps": 2**31}, "--num_training_steps must be at least 0 and at most 2147483647"),
        ({"seed": 2**63}, "--seed"),
        ({"kernels": "off", "attention": "sdpa"}, "--kernels off"),
        ({"fresh": True, "do_train": False, "do_eval": True}, "--fresh"),
        ({"task_name": "RTD", "init_model": "x"}, "--init_model"),
        ({"fresh_head": True}, "--fresh_head and --resize_vocab are for the weights"),
    ],
)
def test_train_config(change, named):
    values = PATHS | {"do_train": True}
    TrainConfig(**values).validate()
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**values | change).validate()


def test_bounds():
    assert [value in Bounds(0.0, 1.0, is_maximum_excluded=True) for value in (-0.1, 0.0, 0.5, 1.0)] == [
        False, True, True, False
    ]  # fmt: skip
    assert [value in Bounds(0.0, is_minimum_excluded=True) for value in (0.0, 1e-9, float("inf"))] == [
        False, True, False
    ]  # fmt: skip


IMPOSSIBLE = [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**40, -(10**40)]
NUMBERS = [
    (config, item.name)
    for config in (TrainConfig, ModelConfig)
    for item in dataclasses.fields(config)
    if item.type in ("int", "float")
]


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_numbers_are_bounded(config, name):
    """No flag, and no field of a model config, takes a number that overflows elsewhere."""
    usual = config.from_dict(tiny_model()) if config is ModelConfig else TrainConfig(**PATHS, do_train=True)
    usual.validate()
    is_count = type(getattr(usual, name)) is int or name in ("warmup", "num_train_epochs")
    for value in [*IMPOSSIBLE, *[10**20, -(10**20)] * is_count]:
        with pytest.raises(ConfigError, match=rf"{name} must be (at least|above) .* and (at most|below) "):
            dataclasses.replace(usual, **{name: value}).validate()


def test_epsilon_is_above_zero():
    """With 0, the update of a parameter without gradient is 0 / 0."""
    with pytest.raises(ConfigError, match="--epsilon must be above"):
        TrainConfig(**PATHS, do_train=True, epsilon=0.0).validate()


def test_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"hidden_size": 48, "layers": {"n": 1}, "hidden_size": 24}')
    with pytest.raises(ConfigError, match=r"twice.json: .* \(a key stands twice in an object\)"):
        ModelConfig.from_json(path)


def test_a_directory_in_place_of_a_file(tmp_path):
    advice = "a directory; give the JSON file in it, such as config.json"
    with pytest.raises(ConfigError, match=f"^{tmp_path}: {advice}$"):
        ModelConfig.from_json(tmp_path)


def test_wrong_types_are_shown_as_json():
    for value, shown in ((None, "null"), (True, "true"), ([None], "[null]"), ({"a": False}, '{"a": false}')):
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_dict(tiny_model() | {"hidden_size": value})
        assert str(error.value) == f"model config: hidden_size must be int, not {shown}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero": 1}, "'zero'"),
        ({"workers": "2"}, "workers must be int"),
        ({"do_train": 1}, "do_train must be bool"),
        ({"fp16": 1}, "fp16 must be bool or null"),
        ({"workers": None}, "workers must be int, not null"),
    ],
)
def test_settings_of_a_run_are_typed(change, named):
    with pytest.raises(ConfigError, match=f"config.json: .*{named}"):
        TrainConfig.from_dict(TrainConfig().to_dict() | change, "config.json")


def test_settings_survive_json():
    config = TrainConfig(do_train=True, warmup=3.0, fp16=True, **PATHS)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_flag_is_described_once():
    """Help, a group at the first one, and bounds for every number; choices hold the default."""
    fields = dataclasses.fields(TrainConfig)
    assert fields[0].metadata["group"]
    for field in fields:
        metadata = field.metadata
        assert metadata["help"]
        if type(field.default) in (int, float):
            assert isinstance(metadata["limit"], Bounds)
            assert type(field.default) is float or metadata["limit"].maximum < 2**63
        if metadata["limit"]:
            assert field.default in metadata["limit"]


def test_what_a_resumed_run_must_have_in_common():
    """All that determines the numbers, `kernels` too: auto and off draw different dropout masks."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names - FREE_TO_CHANGE == {
        "task_name", "init_model", "init_generator", "init_discriminator", "fresh_head", "resize_vocab",
        "replay_share",
        "vocab_type",
        "max_seq_length", "max_ngram", "train_batch_size", "accumulative_update", "seed",
        "num_training_steps", "learning_rate", "discriminator_learning_rate", "warmup",
        "lr_schedule", "lr_schedule_ends",
        "weight_decay", "adam_beta1", "adam_beta2", "epsilon", "max_grad_norm", "skip_spikes", "rtd_lambda",
        "decoupled_training", "precision", "kernels", "attention", "compile", "deterministic", "tf32",
    }  # fmt: skip
    assert {
        "data_dir", "vocab_path", "model_config", "output_dir", "init_model", "init_generator",
        "init_discriminator", "resize_vocab", "replay", "workers", "nproc_per_node", "log_level",
    } == FREE_PER_NODE  # fmt: skip
