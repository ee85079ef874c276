"""Sample predictions: what the models compute, the same sentences each time."""

import json
import logging
import os

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.dataset import BatchPlan, EvaluationBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.log import set_up_logging
from DeBERTa.training.samples import SENTENCES, TOKENS, format_sentence, make_sample_batch, write_samples
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import train_config

CPU = torch.device("cpu")


def build(task, sharing="gdes"):
    torch.manual_seed(0)
    if task == "MLM":
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
        return model, MaskedLMStep(model, train_config(), "fp32", CPU, total_steps=10)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd(sharing)))
    return model, ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)


@pytest.fixture
def batches(tokenizer, prepared):
    store = open_store(prepared / "valid.txt", tokenizer, 62)
    return EvaluationBatches(store, tokenizer, Masker(tokenizer, 1, True), BatchPlan(3, 4, 64))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_they_are_what_the_model_computes(task, batches, tmp_path, caplog):
    model, training = build(task)
    model.train()
    with caplog.at_level(logging.INFO):
        for step in (2, 4):
            write_samples(tmp_path / "samples.jsonl", step, training, batches)
    assert model.training
    first, second = read(tmp_path / "samples.jsonl")
    assert (first["step"], second["step"]) == (2, 4)
    assert first["sentences"] == second["sentences"]
    logged = [format_sentence(tokens) for tokens in first["sentences"]]
    assert caplog.messages == [f"step {step}: {line}" for step in (2, 4) for line in logged]

    batch = make_sample_batch(batches).to(torch.device("cpu"))
    lines = len(batches.store)
    pieces = batches.tokenizer.pieces
    model.eval()
    with torch.no_grad():
        generator = model.generator if task == "RTD" else model
        logits = generator(batch.input_ids, batch.input_mask, batch.labels).logits
        guesses = iter(generator.compute_masked_loss(batch, is_sampled=True).samples.tolist())
        scores = (
            model.discriminate(generator.generate(batch).corrupted_ids, batch.input_mask, batch.labels).logits
            if task == "RTD"
            else None
        )
    probabilities = iter(torch.softmax(logits, 1))
    for row, sentence in enumerate(first["sentences"]):
        ids = batches.store[row * lines // SENTENCES][:TOKENS]
        assert [token["token"] for token in sentence] == [pieces[i] for i in ids]
        for column, token in enumerate(sentence, start=1):
            is_masked = bool(batch.labels[row, column])
            assert ("probability" in token, "guess" in token) == (is_masked, is_masked)
            if is_masked:
                assert token["probability"] == pytest.approx(
                    float(next(probabilities)[ids[column - 1]]), abs=1e-4
                )
                assert token["guess"] == pieces[next(guesses)]
            if scores is not None:
                assert token["replaced"] == pytest.approx(float(scores[row, column].sigmoid()), abs=1e-4)
            else:
                assert "replaced" not in token
    assert next(probabilities, None) is None


@pytest.mark.parametrize(("task", "sharing"), [("MLM", ""), ("RTD", "es"), ("RTD", "nes"), ("RTD", "gdes")])
def test_residual_drift(task, sharing, batches, tmp_path):
    model, training = build(task, sharing)
    write_samples(tmp_path / "samples.jsonl", 1, training, batches)
    (line,) = read(tmp_path / "samples.jsonl")
    assert line["residual_drift"] == (0 if sharing == "gdes" else None)
    if sharing == "gdes":
        table = model.generator.deberta.embeddings.word_embeddings.weight
        with torch.no_grad():
            (residual,) = model.discriminator.deberta.embeddings.word_embeddings.parameters()
            residual.copy_(table / 4)
        write_samples(tmp_path / "samples.jsonl", 2, training, batches)
        assert read(tmp_path / "samples.jsonl")[1]["residual_drift"] == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_nothing_but_a_file_is_written_to(batches, tmp_path, capsys, kind):
    set_up_logging()
    path, precious = tmp_path / "samples.jsonl", tmp_path / "precious"
    precious.touch()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(precious)
    write_samples(path, 1, build("MLM", "")[1], batches)
    assert f"cannot write {path}: " in capsys.readouterr().err
    assert precious.read_bytes() == b""


def test_the_log_shows_guesses_and_probabilities():
    tokens = [
        {"token": "▁the", "replaced": 0.25},
        {"token": "▁un", "replaced": 0.5, "guess": "▁in", "probability": 0.07},
        {"token": "ion", "replaced": 0.1},
    ]
    assert format_sentence(tokens) == "the un [in, original 7%, replaced 50%]ion"
