"""Model cards and the picture of the losses."""

import xml.etree.ElementTree as ET

import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.hub.export import build_config, list_models
from DeBERTa.hub.model_card import RunRecord, draw_curves, format_card
from tests.conftest import tiny_model

METRICS = [
    {"step": 1, "kind": "train", "loss": 7.5, "elapsed_seconds": 1.0},
    {"step": 4, "kind": "train", "loss": None},
    {"step": 10, "kind": "spike", "loss": 99.0},
    {"step": 10, "kind": "train", "loss": 5.5},
    {"step": 10, "kind": "valid", "loss": 6.0, "accuracy": 0.25, "elapsed_seconds": 2.0},
]
SETTINGS = {
    "train": {"tag": "my-run", "learning_rate": 1e-4, "data_dir": "/private/data", "task_name": "MLM"},
    "data": {"train_lines": 600},
}


def get_config() -> dict:
    with torch.device("meta"):
        (model,) = list_models(MaskedLanguageModel(ModelConfig.from_dict(tiny_model())))
    return build_config(model)


def test_card():
    """Recipe, data and results of the run; no paths of the machine, no times."""
    card = format_card("model", get_config(), RunRecord(SETTINGS, METRICS))
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    for line in ("# my-run: model", "| learning_rate | 0.0001 |", "| train_lines | 600 |"):
        assert f"\n{line}\n" in card
    assert "## Validation at step 10\n" in card
    assert "| accuracy | 0.25 |" in card
    assert "(curves.svg)" in card
    assert "/private" not in card
    assert "elapsed" not in card


def test_card_without_a_run():
    card = format_card("model", get_config(), RunRecord())
    assert "# DeBERTa: model" in card
    assert "##" not in card
    assert "svg" not in card


def test_picture():
    """A plot per loss with a line of the training losses and a circle per validation; well-formed XML."""
    picture = ET.fromstring(draw_curves(METRICS))
    namespace = "{http://www.w3.org/2000/svg}"
    (line,) = picture.iter(f"{namespace}polyline")
    assert line.get("points") == "50.0,25.0 590.0,175.0"
    (circle,) = picture.iter(f"{namespace}circle")
    assert (circle.get("cx"), circle.get("cy")) == ("590.0", "137.5")
    assert draw_curves(METRICS[:1]) == ""
    assert draw_curves([{"step": s, "kind": "train", "loss": 3.0} for s in (1, 2)])  # a flat line


def test_reading_a_run(tmp_path):
    assert RunRecord.read(tmp_path) == RunRecord({}, [])
    (tmp_path / "config.json").write_text('{"train": {"tag": "x"}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n')
    record = RunRecord.read(tmp_path, step=1)
    assert record.settings["train"]["tag"] == "x"
    assert [line["step"] for line in record.metrics] == [1]
