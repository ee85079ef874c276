"""The ablations: arms, equal compute, cosines and tables. tests/slow/test_ablations.py runs the command."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from DeBERTa.config import ModelConfig, RTDConfig, TrainConfig, read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError, DataError
from DeBERTa.hub.weights import write_tensors
from experiments.ablations.bert import build_bert, train
from experiments.ablations.run import ARMS, WORDS, build_config, count_flops, main, measure_cosines
from experiments.ablations.table import draw_curves, format_interval, format_tables, read_results
from tests.conftest import GOLDEN, ROOT, strip_times, tiny_model

BASE = {"generator": tiny_model(), "discriminator": tiny_model() | {"num_hidden_layers": 4}}
BASE = {name: model | {"max_position_embeddings": 128} for name, model in BASE.items()}


@pytest.mark.parametrize("arm", ARMS)
def test_arms(arm):
    """Every arm is a valid model, and differs from the others."""
    config = build_config(arm, BASE)
    (RTDConfig if "generator" in config else ModelConfig).from_dict(config)
    assert [other for other in ARMS if build_config(other, BASE) == config] == [arm]


def test_a_command_that_fails(tmp_path):
    """It has logged one sentence, and a traceback adds nothing."""
    (tmp_path / "cache").touch()
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "ablations" / "run.py", "--arms", "gdes", "--steps", "1"],
        env=os.environ | {"DEBERTA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert strip_times(done.stderr).startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_flops():
    """Those of a layer, by hand: a generator of 2 layers more adds their matmuls to a step of MLM."""
    flops = [
        count_flops(build_config("mlm-absolute", BASE | {"discriminator": BASE["discriminator"] | change}))
        for change in ({}, {"num_hidden_layers": 6})
    ]
    tokens, width, inner, length = 16 * 128, 32, 64, 128
    layer = 2 * tokens * (4 * width * width + 2 * width * inner + 2 * length * width)
    assert flops[1] - flops[0] == pytest.approx(2 * 3 * layer, rel=0.01)
    assert count_flops(build_config("gdes", BASE)) == count_flops(build_config("nes", BASE))


def test_cosines(tmp_path):
    """Known tables: the discriminator's is the generator's, rotated by 60 degrees."""
    rows = len(Tokenizer(GOLDEN / "prepare" / "spm.model"))
    half = torch.arange(rows + 56) % 2  # two opposite directions, and rows without tokens
    table = torch.stack([1.0 - 2 * half, torch.zeros(rows + 56)], 1)
    angle = math.radians(60)
    rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for name, words in (("generator", table), ("discriminator", 3 * table @ rotation)):
        (tmp_path / name).mkdir()
        shutil.copy(GOLDEN / "prepare" / "spm.model", tmp_path / name)
        write_tensors({WORDS: words.contiguous()}, tmp_path / name / "model.safetensors")
    cosines = measure_cosines(tmp_path)
    assert cosines["between"] == pytest.approx(0.5)
    assert cosines["generator"] == pytest.approx(cosines["discriminator"])
    assert cosines["generator"] == pytest.approx(0, abs=1e-3)


def make_result(arm, seed, auc):
    final = {"step": 8, "generator_loss": 5.0 + seed, "discriminator_loss": 0.3, "discriminator_auc": auc}
    common = {"flops": 1e12, "steps": 8, "commit": "0123456789", "device": "CPU", "wall_seconds": 600.0}
    probe = {"discriminator_tag_accuracy": 0.7}
    return common | {
        "arm": arm,
        "model_sha256": "0",
        "seed": seed,
        "final": final,
        "probe": probe,
        "cosines": {},
        "curve": [final],
    }


def test_tables():
    """A column per arm with intervals over its seeds, and a dash for what was not measured."""
    results = [make_result("gdes", seed, 0.6 + 0.01 * seed) for seed in (1, 2, 3)] + [
        make_result("nes", 1, 0.5)
    ]
    heading, table = format_tables(results)
    assert heading == "Each run: 1e+12 FLOPs; CPU."
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    rows = {title: cells for title, *cells in lines}
    # Student's t with 2 degrees of freedom, 4.303, times 0.01 / sqrt(3)
    assert rows["ROC AUC"] == ["0.620 ± 0.025", "0.500"]
    names = ("", "steps", "seeds", "minutes", "commit")
    assert [rows[name] for name in names] == [
        ["gdes", "nes"],
        ["8"] * 2,
        ["3", "1"],
        ["10"] * 2,
        ["01234567"] * 2,
    ]
    assert rows["pairs"][0] == "–"


def test_another_model_has_a_column_of_its_own():
    """Also where its steps have the same FLOPs."""
    results = [make_result("gdes", 1, 0.6), make_result("gdes", 1, 0.8) | {"model_sha256": "1"}]
    _, table = format_tables(results)
    (row,) = (line for line in table.splitlines() if "ROC AUC" in line)
    assert row == "| ROC AUC | 0.600 | 0.800 |"


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(
        DataError, match=r"regular file; give a file that experiments/ablations/run\.py wrote"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize("damage", ['{"arm": "gd', "[]", "{}"])
def test_a_damaged_line_of_the_results(damage, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(make_result("gdes", 1, 0.6)) + "\n" + damage + "\n")
    with pytest.raises(DataError, match=f"line 2 of {path} is not a result of .*: remove the line"):
        read_results(path)


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--model_config", "experiments/language_model/bert_tiny.json"]]
)
def test_flags_that_cannot_work(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    assert main() in (1, 2)
    error = strip_times(capsys.readouterr().err)
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_interval():
    assert format_interval([1.0, 1.0]) == "1.000"  # the same by construction: no interval
    assert format_interval([]) == "–"
    stats = pytest.importorskip("scipy.stats")
    for number in range(2, 40):
        values = [float(n % 3) for n in range(number)]
        half = stats.t.ppf(0.975, number - 1) * stats.sem(values)
        shown = float(format_interval(values).partition(" ± ")[2])
        assert half - 6e-4 < shown < 1.03 * half + 6e-4  # never too narrow


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves([make_result("gdes", 1, 0.6), make_result("es", 1, 0.5)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_model_is_there():
    config = read_json(ROOT / "experiments" / "ablations" / "model.json")
    assert all(build_config(arm, config) for arm in ARMS)


def test_bert_of_transformers(prepared):
    """It takes the configs and the batches of runs, starts at the entropy of a uniform guess, and learns."""
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    data = {"data_dir": str(prepared), "vocab_path": str(prepared / "spm.model"), "max_seq_length": 64}
    rates = {"learning_rate": 2e-3, "warmup": 1.0, "lr_schedule": "constant", "train_batch_size": 32}
    absolute = tiny_model() | ARMS["mlm-absolute"]
    model = build_bert(ModelConfig.from_dict(absolute), seed=1)
    losses = train(model, TrainConfig(**data, **rates, num_training_steps=20), 20)
    assert losses[0] == pytest.approx(math.log(absolute["vocab_size"]), rel=0.02)
    assert losses[-1] < losses[0] - 0.2
    with pytest.raises(ConfigError, match="its model is not a BERT"):
        build_bert(ModelConfig.from_dict(tiny_model()), seed=1)
