"""Model cards and the picture of the losses."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.hub.export import build_config, list_models
from DeBERTa.hub.model_card import draw_curves, format_card, read_record
from DeBERTa.report.read import RunRecord
from tests.conftest import tiny_model

METRICS = [
    {"step": 1, "kind": "train", "loss": 7.5, "elapsed_seconds": 1.0},
    {"step": 4, "kind": "train", "loss": None},
    {"step": 10, "kind": "spike", "loss": 99.0},
    {"step": 10, "kind": "train", "loss": 5.5},
    {"step": 10, "kind": "valid", "loss": 6.0, "accuracy": 0.25, "elapsed_seconds": 2.0},
]
SETTINGS = {
    "train": {
        "tag": "my-run",
        "learning_rate": 1e-4,
        "lr_schedule": "wsd",
        "replay": "/private/old",
        "replay_share": 0.2,
        "data_dir": "/private/data",
        "task_name": "MLM",
        "seed": None,
    },
    "data": {"train_lines": 600, "replay_sha256": None},
}


def get_config() -> dict:
    with torch.device("meta"):
        (model,) = list_models(MaskedLanguageModel(ModelConfig.from_dict(tiny_model())))
    return build_config(model)


def read_made_run(run_dir: Path, step: float = 1e9) -> RunRecord:
    """Write the files of a run, and read them."""
    (run_dir / "config.json").write_text(json.dumps(SETTINGS))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    run = read_record(run_dir, step)
    assert run is not None
    return run


def test_card(tmp_path):
    """Recipe, data and results of the run; no paths of the machine, no times."""
    card = format_card("model", get_config(), read_made_run(tmp_path))
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    for line in ("# my-run: model", "| learning_rate | 0.0001 |", "| train_lines | 600 |"):
        assert f"\n{line}\n" in card
    assert "| lr_schedule | wsd |" in card
    assert "| replay_share | 0.2 |" in card
    assert "None" not in card
    assert "## Validation at step 10\n" in card
    assert "| accuracy | 0.25 |" in card
    assert "(curves.svg)" in card
    assert "/private" not in card
    assert "elapsed" not in card


def test_card_up_to_a_step(tmp_path):
    card = format_card("model", get_config(), read_made_run(tmp_path, step=4))
    assert "## Recipe, up to step 4\n" in card
    assert "Validation" not in card


def test_no_share_without_replay(tmp_path):
    run = read_made_run(tmp_path)
    del run.train["replay"]
    assert "replay_share" not in format_card("model", get_config(), run)


def test_card_without_a_run(tmp_path):
    assert read_record(tmp_path) is None
    card = format_card("model", get_config(), None)
    assert "# DeBERTa: model" in card
    assert "##" not in card
    assert "svg" not in card


def test_picture(tmp_path):
    """A chart of the loss: a curve of the training, one of the validation; well-formed XML."""
    picture = ET.fromstring(draw_curves(read_made_run(tmp_path)))
    namespace = "{http://www.w3.org/2000/svg}"
    (train,) = picture.iter(f"{namespace}polyline")
    (valid,) = picture.iter(f"{namespace}circle")  # one evaluation
    assert train.get("points").split()[-1] == "390.0,186.0"  # the last step, the lowest loss
    assert valid.get("class") == "curve c1"
    texts = ["".join(text.itertext()) for text in picture.iter(f"{namespace}text")]
    assert texts[:2] == ["Loss on masked tokens (nats per token) by step", "train valid"]
