"""Where `--init_*` leads: files, directories of models and runs, the hub; what is reported."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.download import REVISIONS
from DeBERTa.errors import ConfigError
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.train import main
from DeBERTa.training.initial_weights import find_weights
from tests.conftest import ROOT, TINY, strip_times, tiny_model, tiny_rtd
from tests.hub.exported import VOCABULARY
from tests.hub.server import run_hub
from tests.hub.test_published import disturb
from tests.runs import build_arguments
from tests.test_train import assert_refused, assert_trained, flags, read_metrics, train  # noqa: F401

CONFIG = ModelConfig.from_dict(TINY)


@pytest.fixture
def run_here(capsys):
    """Return a function that trains in this process, and returns exit status and messages."""

    def run(values: dict) -> tuple[int, str]:
        status = main([str(part) for part in build_arguments(values)])
        return status, strip_times(capsys.readouterr().err)

    return run


def place(path, config=None):
    """Make a file, and next to it a config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("role", "files", "expected"),
    [
        ("model", ["model/model.safetensors"], "model/model.safetensors"),
        ("model", ["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
        ("generator", ["pytorch_model.bin", "pytorch_model.generator.bin"], "pytorch_model.generator.bin"),
        ("discriminator", ["pytorch_model.bin", "pytorch_model.generator.bin"], "pytorch_model.bin"),
        (
            "generator",
            ["generator/model.safetensors", "discriminator/model.safetensors"],
            "generator/model.safetensors",
        ),
        ("discriminator", ["model/model.safetensors"], "model/model.safetensors"),
        ("generator", ["model.safetensors"], "model.safetensors"),
        ("model", ["a.bin"], "a.bin"),
    ],
)
def test_files_of_a_directory(tmp_path, role, files, expected):
    for name in files:
        place(tmp_path / name)
    reference = tmp_path / expected if files == ["a.bin"] else tmp_path
    assert find_weights(str(reference), role, CONFIG) == tmp_path / expected


def test_directories_without_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no weights: neither model\.safetensors nor"):
        find_weights(str(tmp_path), "model", CONFIG)
    place(tmp_path / "discriminator" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"--init_model takes one; give .*discriminator"):
        find_weights(str(tmp_path), "model", CONFIG)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_biased_input": True}, "position_biased_input (true there, false here)"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type (c2p there, c2p|p2c here)"),
        ({"share_att_key": False}, "share_att_key"),
        ({"norm_rel_ebd": "none"}, "norm_rel_ebd"),
        ({"num_attention_heads": 4}, "num_attention_heads (4 there, 2 here)"),
        ({"hidden_act": "relu"}, "hidden_act (relu there, gelu here)"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"relative_attention": False}, "pos_att_type (none there, c2p|p2c here)"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of"),
        ({"model_type": "bert"}, 'model_type is "bert"'),
        ({"pos_att_type": "c2p|p2c", "num_hidden_layers": 9, "new_key": 1, "conv_act": "relu"}, None),
        # A missing setting has its default; without any setting, nothing is compared.
        ({"position_biased_input": None}, "position_biased_input (true there, false here)"),
        ({"hidden_act": None, "num_attention_heads": None}, None),
        (dict.fromkeys(TINY) | {"transformers_version": "5"}, None),
        # Both tables have 32 rows.
        ({"position_buckets": -1, "max_relative_positions": 16}, "position_buckets (0 there, 16 here)"),
    ],
)
def test_settings_that_no_shape_shows(tmp_path, change, named):
    there = {name: value for name, value in (TINY | change).items() if value is not None}
    path = place(tmp_path / "model.safetensors", there)
    if named is None:
        assert find_weights(str(path), "model", CONFIG) == path
    else:
        with pytest.raises(ConfigError) as error:
            find_weights(str(path), "model", CONFIG)
        assert named in str(error.value)
        assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_settings_of_a_checkpoint_are_compared(tmp_path, task):
    """Its config.json is that of a run; of two models, each is compared with its own."""
    other = CONFIG.to_dict() | {"num_attention_heads": 4, "pos_att_type": "c2p", "hidden_act": "relu"}
    models = {"generator": CONFIG.to_dict(), "discriminator": other} if task == "RTD" else other
    path = place(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors", {"model": models})
    role = "discriminator" if task == "RTD" else "model"
    with pytest.raises(ConfigError) as error:
        find_weights(str(path), role, CONFIG)
    for named in ("num_attention_heads (4 there, 2 here)", "pos_att_type", "hidden_act (relu there"):
        assert named in str(error.value)
    assert find_weights(str(path), role, ModelConfig.from_dict(other)) == path
    if task == "RTD":
        assert find_weights(str(path), "generator", CONFIG) == path


def test_a_published_generator_is_not_compared_with_the_discriminator(tmp_path):
    path = place(tmp_path / "pytorch_model.generator.bin", TINY | {"num_attention_heads": 4})
    assert find_weights(str(tmp_path), "generator", CONFIG) == path


def test_a_run_continues_from_another(flags, run_here):  # noqa: F811
    """From the directory of a run: its loss, far below ln(vocabulary), and a report in two places."""
    first = flags | {"num_training_steps": 60, "dump_interval": 30, "learning_rate": 5e-3}
    assert run_here(first)[0] == 0
    run, uniform = flags["output_dir"], math.log(TINY["vocab_size"])
    reached = read_metrics(run)[-1]
    assert reached["generator_loss"] < uniform - 0.8
    second = flags | {"init_generator": run, "init_discriminator": run, "output_dir": run.with_name("second")}
    second |= {"num_training_steps": 1, "warmup": 0, "learning_rate": 1e-9}
    status, printed = run_here(second)
    assert status == 0, printed
    continued = read_metrics(second["output_dir"])[-1]
    assert continued["kind"] == reached["kind"] == "valid"
    assert continued["generator_loss"] == pytest.approx(reached["generator_loss"], abs=1e-4)
    assert continued["discriminator_loss"] == pytest.approx(reached["discriminator_loss"], abs=1e-4)

    path = str(run / "generator" / "model.safetensors")
    assert f"from (generator)  28 tensors of {path}\n" in printed
    weights = json.loads((second["output_dir"] / "environment.json").read_text())["initial_weights"]
    assert weights["generator"] == {"path": path, "loaded": 28, "new": [], "ignored": []}

    # Another vocabulary, by one piece, is refused, unless --resize_vocab names that of the weights.
    own = run / "discriminator" / "spm.model"
    own.write_bytes(own.read_bytes() + b"\x0a\x0a\x0a\x03new\x15\x00\x00\x80\xbf")
    second |= {"output_dir": run.with_name("third")}
    status, printed = run_here(second)
    assert status == 1
    assert f"it is that of {own}; give it as --vocab_path" in printed
    status, printed = run_here(second | {"resize_vocab": own})
    assert status == 1
    generator = run / "generator"
    assert f"{generator / 'model.safetensors'} is of another vocabulary than {own}: " in printed
    shutil.copy(own, generator)
    assert run_here(second | {"resize_vocab": own})[0] == 0

    # Without final models, the newest valid checkpoint; a damaged one is passed over.
    for role in ("generator", "discriminator"):
        shutil.rmtree(run / role)
    (run / "checkpoints" / "step-00000060" / "model.safetensors").write_bytes(b"")
    path = run / "checkpoints" / "step-00000030" / "model.safetensors"
    assert find_weights(str(run), "generator", CONFIG) == path


def test_continuing_from_the_hub(flags, tmp_path):  # noqa: F811
    """`./rtd.sh deberta-v3-X-continue`: the pair comes from the pinned revision; base has no generator."""
    published = disturb(RTDModel(RTDConfig.from_dict(tiny_rtd())))
    for name, part in (("pytorch_model.generator", "generator"), ("pytorch_model", "discriminator")):
        state = {k: v.half() for k, v in getattr(published, part).state_dict().items()}
        if part == "discriminator":
            full = published.merge_discriminator()
            state["deberta.embeddings.word_embeddings.weight"] = full[
                "deberta.embeddings.word_embeddings.weight"
            ]
            del state["deberta.embeddings.position_embeddings._weight"]
        torch.save(state, tmp_path / f"{name}.bin")
    repository = "microsoft/deberta-v3-small"
    preset = {"preset": "deberta-v3-small-continue", "dump_interval": 1, "num_training_steps": 1}
    preset = {k: v for k, v in flags.items() if k != "task_name"} | preset
    with run_hub() as hub:
        hub.repositories, hub.revisions = {repository}, {REVISIONS[repository]}
        hub.files["config.json"] = json.dumps(TINY | {"model_type": "deberta-v2"}).encode()
        hub.files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
        environment = hub.build_environment(tmp_path / "hub")
        assert_refused(
            train(preset, **environment),
            f"hf:{repository} has no pytorch_model.generator.bin; give --init_generator from-discriminator",
        )
        hub.files["pytorch_model.generator.bin"] = (tmp_path / "pytorch_model.generator.bin").read_bytes()
        output = assert_trained(preset, **environment)
        assert re.search(
            rf"from \(discriminator\)  \d+ tensors of {tmp_path}/hub/.*/pytorch_model.bin", output
        )
        hub.files["config.json"] = json.dumps(TINY | {"hidden_act": "relu"}).encode()
        shutil.rmtree(tmp_path / "hub")
        shutil.rmtree(flags["output_dir"])
        assert_refused(train(preset, **environment), "hidden_act (relu there, gelu here)")


FIND_GENERATOR = """
import sys
from DeBERTa.command import run_command
from DeBERTa.config import ModelConfig
from DeBERTa.training.initial_weights import find_weights
config = ModelConfig.from_json(sys.argv[1])
sys.exit(run_command(lambda: print(find_weights("hf:owner/name", "generator", config))))
"""


def test_a_generator_in_a_repository_of_its_own(tmp_path):
    """As it is exported. A discriminator there is not taken for one."""
    found = {}
    for model in list_models(RTDModel(RTDConfig.from_dict(tiny_rtd()))):
        write_model(model, tmp_path / model.name, Tokenizer(VOCABULARY), None)
        with run_hub() as hub:
            hub.files = {path.name: path.read_bytes() for path in (tmp_path / model.name).iterdir()}
            found[model.name] = subprocess.run(
                [sys.executable, "-c", FIND_GENERATOR, tmp_path / "generator" / "config.json"],
                cwd=ROOT, env=os.environ | hub.build_environment(tmp_path / f"hub-{model.name}"),
                capture_output=True, text=True, check=False,
            )  # fmt: skip
    assert found["generator"].returncode == 0, found["generator"].stderr
    path = Path(found["generator"].stdout.strip())
    for name in ("model.safetensors", "config.json", "spm.model"):
        assert path.with_name(name).read_bytes() == (tmp_path / "generator" / name).read_bytes()
    assert found["discriminator"].returncode == 1
    assert "hf:owner/name has no pytorch_model.generator.bin; give" in found["discriminator"].stderr


def test_not_a_number_is_reported_at_load(flags, tmp_path, run_here):  # noqa: F811
    state = MaskedLanguageModel(ModelConfig.from_dict(tiny_model())).state_dict()
    state["deberta.encoder.LayerNorm.weight"][3] = float("nan")
    torch.save(state, tmp_path / "model.bin")
    mlm = {"task_name": "MLM", "model_config": tmp_path / "mlm.json", "init_model": tmp_path / "model.bin"}
    status, printed = run_here(flags | mlm)
    assert status == 1
    reason = "cannot be used: 1 of 32 values of deberta.encoder.LayerNorm.weight"
    assert f"error: {tmp_path / 'model.bin'} {reason}" in printed


def test_a_missing_head_starts_new_when_asked(flags, tmp_path, run_here):  # noqa: F811
    state = MaskedLanguageModel(ModelConfig.from_dict(tiny_model())).state_dict()
    state = {name: tensor for name, tensor in state.items() if name.startswith("deberta.")}
    torch.save(state | {"config": {"hidden_size": 32}}, tmp_path / "model.bin")
    mlm = {"task_name": "MLM", "model_config": tmp_path / "mlm.json", "init_model": tmp_path / "model.bin"}
    status, printed = run_here(flags | mlm)
    assert status == 1
    assert "no LM head (lm_predictions.lm_head.bias is missing); give --fresh_head to start it new" in printed
    status, printed = run_here(flags | mlm | {"fresh_head": True, "num_training_steps": 1})
    assert status == 0, printed
    assert "; new: LM head" in printed
