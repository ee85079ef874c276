"""Masked and replaced tokens of a text."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from DeBERTa import MaskedLanguageModel, ReplacedTokenDetectionModel
from DeBERTa.data.tokenizer import Tokenizer, train_vocabulary
from DeBERTa.errors import ConfigError
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import detect_replaced, encode_prompt, fill_masks, open_model
from DeBERTa.hub.weights import write_tensors
from tests.hub.exported import VOCABULARY, build_model

TEXT = "The state of the [MASK] is strong."


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = build_model("deberta-v3")
    for each in list_models(model):
        write_model(each, folder / each.name, Tokenizer(VOCABULARY), None)
    return folder, model


def test_text_after_a_special_piece():
    """It starts a word only after a space; without special pieces, ids are those of the tokenizer."""
    tokenizer = Tokenizer(VOCABULARY)
    cases = {
        "[MASK].": ["[MASK]", "."],
        "[MASK] .": ["[MASK]", "\u2581", "."],
        "[MASK]\u00a0of [MASK]s": ["[MASK]", "\u2581of", "[MASK]", "s"],
        " of [SEP]": ["\u2581of", "[SEP]"],
        "": [],
    }
    for text, pieces in cases.items():
        ids = encode_prompt(tokenizer, text)
        assert [tokenizer.pieces[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"], text
    line = "The Congress of the United States, 1790."
    assert encode_prompt(tokenizer, line)[1:-1] == tokenizer.encode_lines([line])[0]


def test_fill_masks(exported):
    """The most probable tokens first; probabilities of all tokens sum to 1."""
    folder, model = exported
    opened, tokenizer = open_model(folder / "generator", MaskedLanguageModel)
    (predictions,) = fill_masks(opened, tokenizer, TEXT, top_k=3)
    assert len(predictions) == 3
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    labels = torch.where(ids == tokenizer.mask_id, 7, 0)
    logits = model.generator(ids, torch.ones_like(ids), labels).logits[0]
    best = logits.argmax().item()
    assert predictions[0].piece == tokenizer.pieces[best]
    assert predictions[0].probability == pytest.approx(logits.softmax(0)[best].item(), abs=1e-6)
    (everything,) = fill_masks(opened, tokenizer, TEXT, top_k=10_000)
    assert len(everything) == len(tokenizer)
    assert sum(p for _, p in everything) == pytest.approx(1, abs=0.02)  # 7 rows of the table have no token
    assert len(fill_masks(opened, tokenizer, "[MASK] [MASK]", top_k=1)) == 2


def test_detect_replaced(exported):
    folder, model = exported
    opened, tokenizer = open_model(folder / "discriminator", ReplacedTokenDetectionModel)
    tokens = detect_replaced(opened, tokenizer, TEXT)
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    expected = model.discriminate(ids, torch.ones_like(ids), ids).logits[0].sigmoid()[1:-1]
    assert [piece for piece, _ in tokens] == [tokenizer.pieces[i] for i in ids[0, 1:-1]]
    torch.testing.assert_close(torch.tensor([p for _, p in tokens]), expected, atol=1e-6, rtol=0)


def test_a_vocabulary_that_was_replaced(exported, tmp_path):
    """One byte of a score or of the normalizer, or the file; without tokenizer.json it cannot be noticed."""
    folder = shutil.copytree(exported[0] / "generator", tmp_path / "model")
    content = bytearray((folder / "spm.model").read_bytes())
    damaged = [bytearray(content), bytearray(content)]
    damaged[0][content.index("▁the".encode()) + 8] ^= 1
    damaged[1][-1000] ^= 1  # in the map of characters, at the end of the file
    other = train_vocabulary(["αβγδ εζηθ ικλμ"] * 500, 112)
    for data in (*damaged, other):
        (folder / "spm.model").write_bytes(data)
        with pytest.raises(ConfigError, match=r"spm.model and tokenizer.json are not of the same vocabulary"):
            open_model(folder, MaskedLanguageModel)
    (folder / "spm.model").write_bytes(content)
    intact = json.loads((folder / "tokenizer.json").read_text())
    pieces = intact["model"]["vocab"]
    appended = intact | {"model": {"vocab": [*pieces, ["[MASK]", 0.0]]}}
    (folder / "tokenizer.json").write_text(json.dumps(appended))
    open_model(folder, MaskedLanguageModel)
    for foreign in (
        *({}, {"model": []}, {"model": {"vocab": [1]}}, intact | {"normalizer": {"normalizers": [1]}}),
        *(intact | {"model": {"vocab": vocab}} for vocab in ([], pieces[:-1], [*pieces, ["of", 0.0]])),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(foreign))
        with pytest.raises(ConfigError, match="not of the same vocabulary"):
            open_model(folder, MaskedLanguageModel)
    (folder / "tokenizer.json").unlink()
    open_model(folder, MaskedLanguageModel)


def test_weights_that_are_not_finite(exported, tmp_path):
    folder = shutil.copytree(exported[0] / "generator", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["deberta.embeddings.LayerNorm.weight"][3] = torch.nan
    write_tensors(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be used: 1 of \d+ values of .* are NaN"):
        open_model(folder, MaskedLanguageModel)


def test_errors(exported):
    folder, _ = exported
    with pytest.raises(ConfigError, match=r"give one of .*discriminator, .*generator"):
        open_model(folder, MaskedLanguageModel)
    with pytest.raises(ConfigError, match="another head"):
        open_model(folder / "discriminator", MaskedLanguageModel)
    with pytest.raises(ConfigError, match="another head"):
        open_model(folder / "generator", ReplacedTokenDetectionModel)
    opened, tokenizer = open_model(folder / "generator", MaskedLanguageModel)
    with pytest.raises(ConfigError, match=r"no \[MASK\]"):
        fill_masks(opened, tokenizer, "nothing", 1)
    with pytest.raises(ConfigError, match="the model takes 320"):
        fill_masks(opened, tokenizer, "[MASK] " * 400, 1)
    (folder / "mixed").mkdir()
    for name, source in (
        ("config.json", "generator"),
        ("spm.model", "generator"),
        ("model.safetensors", "discriminator"),
    ):
        shutil.copy(folder / source / name, folder / "mixed")
    message = "model.safetensors does not fit its config.json: "
    with pytest.raises(ConfigError, match=message):
        open_model(folder / "mixed", ReplacedTokenDetectionModel)
    shutil.rmtree(folder / "mixed")
