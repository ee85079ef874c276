"""Every shipped config and preset: sizes as promised, scripts that refuse wrong names."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.config import read_json
from DeBERTa.data.files import open_partial
from DeBERTa.model.pretraining import count_backbone_parameters, count_embedding_parameters
from tests.conftest import ROOT

CONFIGS = ROOT / "experiments" / "language_model"
M = 2**20


def build(name: str) -> torch.nn.Module:
    values = read_json(CONFIGS / name)
    with torch.device("meta"):
        if "generator" in values:
            return RTDModel(RTDConfig.from_dict(values))
        return MaskedLanguageModel(ModelConfig.from_dict(values))


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_every_config_builds(name):
    model = build(name)
    parts = [model] if isinstance(model, MaskedLanguageModel) else [model.generator, model.discriminator]
    assert all(part.config.head_size == 64 for part in parts)
    if isinstance(model, RTDModel):
        assert 2 * model.config.generator.num_hidden_layers == model.config.discriminator.num_hidden_layers


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "backbone", "embedding"),
    [
        ("rtd_xsmall.json", 12, 256, 9, 32),
        ("rtd_base.json", 12, 768, 81, 96),
        ("rtd_large.json", 24, 1024, 288, 128),
    ],
)
def test_promised_sizes(name, layers, hidden, backbone, embedding):
    """Backbone exactly as promised. The promise counts 128 * 1024 rows of the word table; there are 128100."""
    model = build(name).discriminator
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, hidden)
    assert count_backbone_parameters(model) == backbone * M
    assert count_embedding_parameters(model) == 128100 * hidden
    assert embedding * M == 128 * 1024 * hidden


@pytest.mark.parametrize(
    ("name", "layers", "hidden"), [("rtd_xsmall_continue.json", 12, 384), ("rtd_small.json", 6, 768)]
)
def test_public_checkpoint_sizes(name, layers, hidden):
    config = RTDConfig.from_json(CONFIGS / name).discriminator
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (layers, hidden, 128100)


@pytest.mark.parametrize("script", ["mlm.sh", "rtd.sh"])
@pytest.mark.parametrize("arguments", [[], ["no-such-model"]])
def test_no_name_or_a_wrong_one(script, arguments):
    result = subprocess.run([ROOT / script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert not result.stdout
    assert "usage" in result.stderr and "deberta" in result.stderr


def test_continue_asks_for_weights():
    result = subprocess.run(
        [ROOT / "rtd.sh", "deberta-v3-base-continue"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "--init_generator" in result.stderr and "--init_discriminator" in result.stderr


def test_wrong_flags_are_told_before_anything_is_prepared(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"DEBERTA_CACHE": str(tmp_path), "PATH": path}
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False, env=environment)
    for script, name in (("rtd.sh", "deberta-v3-base"), ("mlm.sh", "bert-tiny")):
        result = run([ROOT / script, name, "--lerning_rate", "3"])
        assert result.returncode == 2 and "--lerning_rate" in result.stderr
    result = run([ROOT / "rtd.sh", "deberta-v3-tiny", "--help"])
    assert result.returncode == 0 and "--train_batch_size" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_request_to_save_while_data_is_prepared_does_nothing(tmp_path):
    """SIGUSR1 to the script and all it has started, as Slurm sends it; then SIGTERM, which ends them."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"DEBERTA_CACHE": str(tmp_path), "PATH": path, "DATA": "sample"}
    with open_partial(tmp_path / "sample" / "text" / "source.json"):  # which the preparation waits for
        run = subprocess.Popen(
            [ROOT / "rtd.sh", "deberta-v3-tiny"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert run.stderr.readline().startswith("waiting for another process")
        os.killpg(run.pid, signal.SIGUSR1)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait() == -signal.SIGTERM, run.stderr.read()
        run.stderr.close()
