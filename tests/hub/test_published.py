"""Published weights: every form of a discriminator's tables, files that do not fit."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

from DeBERTa import ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError
from DeBERTa.hub.published import load_rtd, read_weights
from tests.conftest import tiny_rtd
from tests.training.batches import random_batch

WORD = "deberta.embeddings.word_embeddings"
POSITION = "deberta.embeddings.position_embeddings"


@pytest.fixture
def published(tmp_path):
    """Return a directory with a generator, a discriminator, and its residuals."""
    torch.manual_seed(1)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    discriminator = ReplacedTokenDetectionModel(model.config.discriminator).eval()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save(model.generator.state_dict(), tmp_path / "pytorch_model.generator.bin")
    tables = model.generator.tables()
    state = discriminator.state_dict()
    residuals = {
        WORD: state[f"{WORD}.weight"] - tables.word,
        POSITION: state[f"{POSITION}.weight"] - tables.position,
    }
    return tmp_path, discriminator, {k: v.detach() for k, v in residuals.items()}


def variants(state, residuals):
    """Yield the state dicts that published checkpoints may hold."""
    body = {k: v for k, v in state.items() if not k.startswith((WORD, POSITION))}
    head = {
        "lm_predictions.lm_head.bias": torch.zeros(3),
        "deberta.embeddings.position_ids": torch.arange(4)[None],
    }
    tables = {f"{WORD}.weight": state[f"{WORD}.weight"], f"{POSITION}.weight": state[f"{POSITION}.weight"]}
    residual = {f"{name}._weight": tensor for name, tensor in residuals.items()}
    yield "tables", body | tables
    yield "table, other head, no positions", body | head | {f"{WORD}.weight": state[f"{WORD}.weight"]}
    yield "residual", body | residual
    yield "both", body | tables | residual


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("sharing", ["gdes", "nes"])
def test_discriminator_starts_exactly_as_published(published, sharing, suffix):
    directory, discriminator, residuals = published
    batch = random_batch()
    expected = discriminator(batch.input_ids, batch.input_mask, batch.labels).logits
    for name, state in variants(discriminator.state_dict(), residuals):
        path = directory / f"pytorch_model.{suffix}"
        (torch.save if suffix == "bin" else save_file)(copy.deepcopy(state), path)
        model = RTDModel(RTDConfig.from_dict(tiny_rtd(sharing))).eval()
        load_rtd(model, str(directory / "pytorch_model.generator.bin"), str(path))
        actual = model.discriminate(batch.input_ids, batch.input_mask, batch.labels).logits
        torch.testing.assert_close(
            actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        if sharing == "gdes":
            torch.testing.assert_close(
                model.discriminator.state_dict()[f"{WORD}._weight"], residuals[WORD], atol=1e-6, rtol=0
            )


def test_pickled_code_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name, payload in (("zip.bin", None), ("plain.bin", pickle.dumps({"weight": Trap()}))):
        if payload is None:
            torch.save({"weight": Trap()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(payload)
        with pytest.raises(ConfigError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 damaged"])
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_weights(tmp_path / name)


def test_weights_that_do_not_fit_are_named(published):
    directory, discriminator, _ = published
    generator, path = str(directory / "pytorch_model.generator.bin"), directory / "pytorch_model.bin"
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    for change, named in (
        ({"mask_predictions.dense.weight": None}, "mask_predictions.dense.weight is missing"),
        ({"deberta.encoder.layer.9.x": torch.zeros(1)}, "deberta.encoder.layer.9.x is not part"),
        ({f"{WORD}.weight": None}, r"word_embeddings\._weight is missing"),
        ({f"{WORD}.weight": torch.zeros(7, 32)}, r"\[7, 32\]"),
    ):
        state = {k: v for k, v in (discriminator.state_dict() | change).items() if v is not None}
        torch.save(state, path)
        with pytest.raises(ConfigError, match=named):
            load_rtd(model, generator, str(path))
