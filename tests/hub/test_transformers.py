"""Exported directories opened with transformers; tests/slow opens them with another version of it."""

import pytest

from tests.hub.exported import VARIANTS, open_with_transformers, write_all


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("exported")
    write_all(folder)
    return open_with_transformers(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models(results, variant):
    """Hidden states at real positions, 300 tokens, agree to 1e-5; logits of our modeling files to 1e-4."""
    check_variant(results["variants"][variant])


def check_variant(result: dict) -> None:
    assert result["encoder"] == "DebertaV2Model"
    assert result["missing"] == []
    assert result["hidden"] < 1e-5
    assert result["lm"] < 1e-4
    assert result["replaced"] < 1e-4
    assert 6 < result["lm_loss"] < 9  # about ln(2008), for labels that are 0
    assert 0.4 < result["replaced_loss"] < 1


def test_tokenizer(results):
    check_tokenizer(results["tokenizer"])


def check_tokenizer(result: dict) -> None:
    """Compare ids of 20,000 sentences and all compatibility characters; special tokens; pairs."""
    assert result["texts"] > 25_000
    assert result["differing"] == []
    assert result["special"] == [0, 1, 2, 3, 2000]
    assert result["length"] == 320
    ids, types, mask = result["pair"]
    assert (ids[0], ids[2], ids[4]) == (1, 2, 2)
    assert (types, mask) == ([0, 0, 0, 1, 1], [1] * 5)
    assert result["decoded"] == "[CLS] The Union is[MASK], strong.[SEP]"


def test_predictions(results):
    check_predictions(results["predictions"])


def check_predictions(result: dict) -> None:
    """Compare the tokens and probabilities of the pipeline with ours."""
    assert result["class"] == "DebertaForMaskedLM"
    assert result["same_tokens"]
    assert result["distance"] < 1e-4
