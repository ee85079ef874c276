"""The model config of a run: where it is found, how many rows its word table has, heads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from DeBERTa import RTDConfig, RTDModel
from tests.conftest import ROOT, tiny_model, tiny_rtd
from tests.runs import run, tiny_flags


@pytest.fixture
def flags(prepared, tmp_path) -> dict:
    """Return flags of a run of one step. Its vocabulary has 2001 tokens."""
    return tiny_flags(tmp_path, prepared) | {"num_training_steps": 1}


def write_rows(flags: dict, rows: int) -> None:
    values = tiny_rtd()
    for part in ("generator", "discriminator"):
        values[part]["vocab_size"] = rows
    flags["model_config"].write_text(json.dumps(values))


def read_rows(run_dir: Path) -> int:
    return len(load_file(run_dir / "generator" / "model.safetensors")["lm_predictions.lm_head.bias"])


def evaluate(flags: dict) -> tuple[int, str]:
    return run({name: value for name, value in flags.items() if name != "do_train"} | {"do_eval": True})


def assert_refused(flags: dict, *named: str | Path) -> None:
    status, output = run(flags)
    assert status == 1, output
    assert output.startswith("error: ")
    assert all(str(name) in output for name in named), output


@pytest.mark.parametrize("rows", [128100, 1000])
def test_the_vocabulary_size_follows_from_the_vocabulary(flags, rows):
    """Where the rows of the model config do not fit; also when the run is resumed or evaluated."""
    write_rows(flags, rows)
    note = f"the word table has 2048 rows for 2001 tokens, not the {rows} of {flags['model_config']}"
    status, output = run(flags)
    assert status == 0, output
    assert output.count(note) == 2  # as a warning, and in the banner
    assert read_rows(flags["output_dir"]) == 2048
    status, output = run(flags | {"num_training_steps": 2})
    assert status == 0, output
    status, output = evaluate(flags)
    assert status == 0, output


def test_a_vocabulary_size_that_is_given(flags):
    """More rows than tokens are reported; fewer are refused, naming the flag."""
    assert_refused(
        flags | {"vocab_size": 2000},
        "--vocab_size 2000 is too small for the 2001 tokens of",
        "give --vocab_size 2048",
    )
    status, output = run(flags | {"vocab_size": 2500})
    assert status == 0, output
    assert "499 of the 2500 rows of the word table belong to no token" in output
    assert read_rows(flags["output_dir"]) == 2500
    status, output = evaluate(flags)  # of the size of the run
    assert status == 0, output


def test_rows_of_loaded_weights_stay(flags, tmp_path):
    """The weights of mDeBERTa have 251,000 rows for 250,102 tokens."""
    write_rows(flags, 3000)
    model = RTDModel(RTDConfig.from_json(flags["model_config"]))
    weights = {"generator": model.generator.state_dict(), "discriminator": model.merge_discriminator()}
    for name, state in weights.items():
        torch.save(state, tmp_path / f"{name}.bin")
        flags[f"init_{name}"] = tmp_path / f"{name}.bin"
    status, output = run(flags)
    assert status == 0, output
    assert "999 of the 3000 rows of the word table belong to no token" in output
    assert read_rows(flags["output_dir"]) == 3000
    write_rows(flags, 1000)
    assert_refused(flags, "vocab_size 1000 of", "2001 tokens", "--vocab_path")


def test_a_model_config_that_does_not_exist(flags):
    """The message has both places, and the closest name."""
    shipped = ROOT / "experiments" / "language_model" / "rtd_tinny.json"
    assert_refused(flags | {"model_config": "rtd_tinny.json"}, "/rtd_tinny.json", shipped, "rtd_tiny.json")


def test_heads_wider_than_the_model_are_reported(prepared, tmp_path):
    """As a warning, in the banner, and with the final model; the published field still works."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 1}
    values = tiny_model() | {"hidden_size": 96, "num_attention_heads": 3, "attention_head_size": 64}
    flags["model_config"].write_text(json.dumps(values))
    status, output = run(flags)
    assert status == 0, output
    assert output.count("attention_head_size 64 makes 3 heads 192 wide, but hidden_size is 96") == 3
    query = "deberta.encoder.layer.0.attention.self.query_proj.weight"
    assert load_file(flags["output_dir"] / "model" / "model.safetensors")[query].shape == (192, 96)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"generator": 3}, "missing discriminator"),
        (tiny_model() | {"vocab_size": "x"}, 'vocab_size must be int, not "x"'),
        (tiny_rtd() | {"generator": tiny_model() | {"vocab_size": [1]}}, "vocab_size must be int, not [1]"),
    ],
)
def test_a_config_of_a_run_with_values_of_other_types(flags, model, named):
    """Evaluation alone takes the size of the vocabulary from it."""
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "config.json").write_text(json.dumps({"model": model}))
    status, output = evaluate(flags)
    assert status == 1, output
    assert output.startswith(f"error: {flags['output_dir'] / 'config.json'}: ")
    assert named in output
