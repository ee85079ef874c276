"""Exported directories opened with transformers 4, in an environment of its own: it excludes version 5."""

import pytest

from tests.hub.exported import VARIANTS, open_with_transformers, write_all
from tests.hub.test_transformers import check_predictions, check_tokenizer, check_variant
from tests.slow.environments import make_environment

VERSION = "4.57.6"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Open all directories with transformers 4."""
    folder = tmp_path_factory.mktemp("exported")
    needed = ["huggingface_hub<1", "tokenizers<0.23", "requests", "pyyaml", "regex", "packaging", "filelock"]
    python = make_environment(folder / "venv", alone=[f"transformers=={VERSION}"], packages=needed)
    write_all(folder)
    return open_with_transformers(folder, python)


def test_version(results):
    assert results["version"] == VERSION


@pytest.mark.parametrize("variant", VARIANTS)
def test_models(results, variant):
    check_variant(results["variants"][variant])


def test_tokenizer(results):
    check_tokenizer(results["tokenizer"])


def test_predictions(results):
    check_predictions(results["predictions"])
