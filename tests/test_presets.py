"""Every shipped config and preset: sizes as promised, scripts that refuse wrong names."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.config import read_json
from DeBERTa.download import REVISIONS
from DeBERTa.errors import ConfigError
from DeBERTa.files import open_partial
from DeBERTa.flags import parse_flags
from DeBERTa.model.pretraining import count_backbone_parameters, count_embedding_parameters
from DeBERTa.prepare_data import read_preset_flags
from DeBERTa.presets import PRESETS
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
    """With heads of 64, which follow from the other sizes: a copy with other sizes stays consistent."""
    assert "attention_head_size" not in (CONFIGS / name).read_text()
    model = build(name)
    models = [model] if isinstance(model, MaskedLanguageModel) else [model.generator, model.discriminator]
    assert all(encoder.config.head_size == 64 for encoder in models)
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
    """Backbone as promised. The promise counts 128 * 1024 rows of the word table; there are 128100."""
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


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run mlm.sh or rtd.sh with this Python first on the path, so that it sets up none."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path} | environment,
    )


@pytest.mark.parametrize(
    ("script", "known", "unknown"),
    [
        ("mlm.sh", "deberta-base", "deberta-v3-base"),
        ("rtd.sh", "deberta-v3-base", "deberta-base"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["no-such-model"], ["deberta-v-base"], ["--tag", "x"]])
def test_no_name_or_a_wrong_one(script, known, unknown, arguments):
    result = run_script(script, *arguments)
    assert result.returncode == 2
    assert not result.stdout
    (message,) = result.stderr.splitlines()
    assert f"usage: ./{script} NAME" in message
    assert known in message
    assert f" {unknown}" not in message
    assert ("closest" in message) == (arguments == ["deberta-v-base"])


def test_a_preset_of_the_other_task():
    result = run_script("rtd.sh", "bert-base")
    assert result.returncode == 2
    assert "bert-base is a preset for MLM" in result.stderr


def test_a_model_without_published_generator():
    result = run_script("rtd.sh", "deberta-v3-base-continue")
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert "microsoft/deberta-v3-base was published without its generator" in error
    assert "--init_generator from-discriminator" in error


@pytest.mark.parametrize(
    ("size", "generator"), [("xsmall", ""), ("large", ""), ("base", "from-discriminator")]
)
def test_continued_presets_start_from_the_hub(size, generator):
    published = f"hf:microsoft/deberta-v3-{size}"
    flags = ["--preset", f"deberta-v3-{size}-continue"]
    config = parse_flags(flags + (["--init_generator", generator] if generator else []))
    assert (config.init_generator, config.init_discriminator) == (generator or published, published)
    assert published.removeprefix("hf:") in REVISIONS
    config = parse_flags([*flags, "--init_generator", "g.bin", "--init_discriminator", "d.bin"])
    assert (config.init_generator, config.init_discriminator) == ("g.bin", "d.bin")
    config = parse_flags([*flags, "--do_train", "False", "--do_eval"])  # evaluates what was trained
    assert (config.init_generator, config.init_discriminator) == ("", "")


def test_wrong_flags_are_reported_before_anything_is_prepared(tmp_path):
    cache = {"DEBERTA_CACHE": str(tmp_path)}
    for script, name in (("rtd.sh", "deberta-v3-base"), ("mlm.sh", "bert-tiny")):
        result = run_script(script, name, "--lerning_rate", "3", **cache)
        (error,) = result.stderr.splitlines()
        assert result.returncode == 2
        assert "no flag --lerning_rate: did you mean --learning_rate" in error
        result = run_script(script, name, "--adam_beta1", "3", **cache)
        assert result.returncode == 2
        assert "--adam_beta1" in result.stderr
    assert run_script("rtd.sh", "deberta-v3-tiny", DATA="wikipedia", **cache).returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["deberta-v3-tiny", "--help"], ["deberta-v3-tiny", "-h"]])
def test_help_lists_presets_and_flags(tmp_path, arguments):
    result = run_script("rtd.sh", *arguments, DEBERTA_CACHE=str(tmp_path))
    assert result.returncode == 0
    assert not result.stderr
    assert result.stdout.count("usage: ") == 1
    text = "".join(result.stdout.split())  # names may be hyphenated at the end of a line
    assert all(name in text for name in PRESETS)
    assert "--train_batch_size N" in result.stdout
    assert not list(tmp_path.iterdir())


SHARED = {
    "num_training_steps": 1000000,
    "dump_interval": 10000,
    "max_seq_length": 512,
    "warmup": 10000,
    "do_train": True,
}
CONTINUED = {"num_training_steps": 100000, "learning_rate": 5e-5, "train_batch_size": 256, "warmup": 10000}
RECIPES = {
    "bert-base": SHARED | {"learning_rate": 1e-4, "train_batch_size": 256, "max_ngram": 1},
    "deberta-base": SHARED | {"learning_rate": 1e-4, "train_batch_size": 256, "max_ngram": 3},
    "xlarge-v2": SHARED | {"learning_rate": 1e-4, "train_batch_size": 32, "max_ngram": 3, "warmup": 1000},
    "xxlarge-v2": SHARED | {"learning_rate": 1e-4, "train_batch_size": 32, "max_ngram": 3, "warmup": 1000},
    "deberta-v3-xsmall": SHARED | {"learning_rate": 3e-4, "train_batch_size": 64},
    "deberta-v3-small": SHARED | {"learning_rate": 1e-4, "train_batch_size": 256},
    "deberta-v3-base": SHARED | {"learning_rate": 1e-4, "train_batch_size": 256},
    "deberta-v3-large": SHARED | {"learning_rate": 1e-4, "train_batch_size": 256},
    "deberta-v3-xsmall-continue": CONTINUED | {"model_config": "rtd_xsmall_continue.json"},
    "deberta-v3-small-continue": CONTINUED | {"model_config": "rtd_small.json"},
    "deberta-v3-base-continue": CONTINUED | {"model_config": "rtd_base.json"},
    "deberta-v3-large-continue": CONTINUED | {"model_config": "rtd_large.json"},
    "deberta-v3-tiny": {"max_seq_length": 128, "num_training_steps": 5000, "adam_beta2": 0.98},
    "deberta-tiny": {"max_seq_length": 128, "num_training_steps": 400, "max_ngram": 3},
    "bert-tiny": {"max_seq_length": 32, "num_training_steps": 800, "adam_beta2": 0.98},
}


@pytest.mark.parametrize("name", PRESETS)
def test_recipes(name, tmp_path, monkeypatch):
    """Each preset has the figures of the published scripts, and a config that exists."""
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path))
    weights = ["--init_generator", "g.bin", "--init_discriminator", "d.bin"] if "continue" in name else []
    config = parse_flags(["--preset", name, *weights])
    config.validate()
    assert config.tag == name
    assert (CONFIGS / config.model_config).is_file()
    assert config.task_name == ("RTD" if "v3" in name else "MLM")
    assert RECIPES[name].items() <= config.to_dict().items()
    shared = {
        "adam_beta1": 0.9,
        "epsilon": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_schedule_ends": 0.0,
    }
    assert shared.items() <= config.to_dict().items()
    corpus = "sample" if "tiny" in name else "wikitext-103"
    assert config.data_dir == str(tmp_path / corpus / str(config.max_seq_length))
    vocabulary = "sample" if "tiny" in name else "deberta-v3-base"
    assert config.vocab_path == str(tmp_path / vocabulary / "spm.model")


def test_flags_override_the_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path))
    config = parse_flags(
        ["--preset", "deberta-v3-base", "--tag", "x", "--max_seq_length", "64", "--corpus", "sample"]
    )
    assert (config.tag, config.max_seq_length, config.data_dir) == ("x", 64, str(tmp_path / "sample" / "64"))
    assert parse_flags(["--preset", "bert-tiny", "--vocab_size", "8128"]).vocab_size == 8128
    config = parse_flags(["--preset", "deberta-v3-base", "--num_train_epochs", "3"])
    assert (config.num_training_steps, config.num_train_epochs) == (0, 3)
    config = parse_flags(["--preset", "deberta-v3-base", "--data_dir", "d"])
    assert (config.data_dir, config.vocab_path) == ("d", "")
    with pytest.raises(ConfigError, match="--vocab_path is required"):
        config.validate()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--preset", "deberta-v3-tiny"],
            "--corpus sample --output C/sample/128 --max_seq_length 128 --train_vocab 8000",
        ),
        (
            ["--preset", "deberta-v3-base", "--seed", "1"],
            "--corpus wikitext-103 --output C/wikitext-103/512 --max_seq_length 512",
        ),
        (
            ["--preset", "deberta-v3-base", "--corpus", "sample", "--max_seq_len", "64"],
            "--corpus sample --output C/sample/64 --max_seq_length 64 --train_vocab 8000",
        ),
        (  # published weights, and so their vocabulary
            ["--preset", "deberta-v3-small-continue", "--corpus", "sample"],
            "--corpus sample --output C/sample/512-published --max_seq_length 512",
        ),
        (
            ["--preset", "bert-base", "--vocab_path", "V"],
            "--corpus wikitext-103 --output C/wikitext-103/512-H --max_seq_length 512 --vocab_path V",
        ),
        (["--preset", "bert-base", "--data_dir", "d", "--vocab_path", "V"], ""),
        (["--preset", "bert-base", "--help"], ""),
        (["--version", "--preset=bert-base"], ""),
    ],
)
def test_what_is_prepared_for_a_preset(flags, expected, tmp_path, monkeypatch):
    """Training and preparation derive the same directory; another vocabulary has one of its own."""
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path))
    vocabulary = tmp_path / "spm.model"
    vocabulary.write_bytes(b"pieces")
    flags = [str(vocabulary) if flag == "V" else flag for flag in flags]
    fingerprint = hashlib.sha256(b"pieces").hexdigest()[:8]
    expected = (
        expected.replace("C/", f"{tmp_path}/")
        .replace("-H ", f"-{fingerprint} ")
        .replace(" V", f" {vocabulary}")
    )
    assert read_preset_flags(flags) == expected.split()
    if expected:
        config = parse_flags(flags)
        assert config.data_dir in expected.split()
        if "--vocab_path" not in flags:
            folder = "sample" if "--train_vocab" in expected else "deberta-v3-base"
            assert config.vocab_path == str(tmp_path / folder / "spm.model")


@pytest.mark.parametrize("send", [os.killpg, os.kill])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_while_data_is_prepared(tmp_path, send, number):
    """SIGUSR1 does nothing; others end the script and its children, also if the script alone gets them."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"DEBERTA_CACHE": str(tmp_path), "PATH": path, "DATA": "sample"}
    with open_partial(tmp_path / "sample" / "text" / "source.json"):  # which the preparation waits for
        run = subprocess.Popen(
            [ROOT / "rtd.sh", "deberta-v3-xsmall"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            # Ignored where the tests themselves run in the background.
            preexec_fn=lambda: [
                signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)
            ],
        )
        assert "waiting for another process" in run.stderr.readline()
        send(run.pid, signal.SIGUSR1)
        send(run.pid, number)
        assert run.wait(60) == 128 + number, run.stderr.read()
        assert "Traceback" not in run.stderr.read()  # until all that hold its end have ended
        run.stderr.close()
