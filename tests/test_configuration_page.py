"""docs/configuration.md: what `python docs/generate_configuration.py` writes, with every flag and field."""

import dataclasses

from DeBERTa.config import HIDDEN, ModelConfig, TrainConfig
from docs.generate_configuration import MODEL_HELP, generate
from tests.conftest import ROOT


def test_page_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == generate(), "run python docs/generate_configuration.py"


def test_every_flag_and_field_is_there():
    page = generate()
    flags = [field for field in dataclasses.fields(TrainConfig) if HIDDEN not in field.metadata["rules"]]
    assert all(f"| `--{field.name}` | " in page for field in flags)
    assert [field.name for field in dataclasses.fields(ModelConfig)] == list(MODEL_HELP)
    assert len({line.count(" | ") for line in page.splitlines() if line.startswith("| `--")}) == 1
