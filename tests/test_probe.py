"""The probes: what they read, known answers, and the command on a run and on a model directory."""

import json
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, probe
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError
from DeBERTa.report.page import format_page
from DeBERTa.report.read import read_lines, read_run
from DeBERTa.training.checkpoint import get_checkpoint_path
from tests.conftest import GOLDEN, tiny_model
from tests.runs import run, tiny_flags

VOCABULARY = GOLDEN / "prepare" / "spm.model"


@pytest.fixture(scope="module")
def corpus():
    return probe.read_corpus(VOCABULARY, 128)


def build(kind):
    torch.manual_seed(1)
    return kind(ModelConfig.from_dict(tiny_model() | {"max_position_embeddings": 128})).eval()


def take(corpus, every):
    """Return the corpus with a part of its sentences."""
    owners = corpus.owners[::every]
    parts = {owner: corpus.parts[owner] for row in owners for owner in row if owner}
    return corpus._replace(ids=corpus.ids[::every], owners=owners, parts=parts)


def test_corpus(corpus):
    """Every tenth document; its words in three parts, 3 to 1 to 1 by documents."""
    assert (len(corpus.ids), len(corpus.owners), len(corpus.words)) == (5562, 5562, 114_812 + 1)
    counts = [list(corpus.parts.values()).count(part) for part in (probe.FIT, probe.CHOOSE, probe.TEST)]
    # A word has no piece where the one before it takes all, or after the 128th piece.
    expected = {"fit": 68_458, "choose": 23_401, "test": 22_953}
    assert all(0.99 * most < count <= most for count, most in zip(counts, expected.values(), strict=True))
    assert corpus.words[1:5] == [("The", "at"), ("Fulton", "np"), ("County", "nn"), ("Grand", "jj")]


def test_pieces_belong_to_words(corpus):
    """The pieces of a word spell it, up to what a piece takes from the word after it."""
    tokenizer = Tokenizer(VOCABULARY)
    spelled: dict[int, str] = {}
    for ids, owners in zip(corpus.ids[:300], corpus.owners[:300], strict=True):
        assert (owners[0], owners[-1], ids[0], ids[-1]) == (0, 0, 1, 2)
        for i, owner in zip(ids[1:-1], owners[1:-1], strict=True):
            spelled[owner] = spelled.get(owner, "") + tokenizer.pieces[i].replace("▁", "")
    right = sum(corpus.words[owner][0] == text for owner, text in spelled.items())
    assert right > 0.97 * len(spelled)


def test_another_corpus(monkeypatch):
    monkeypatch.setattr(probe, "CORPUS_SHA256", "0" * 64)
    probe.read_corpus.cache_clear()
    with pytest.raises(DataError, match=r"brown\.txt\.xz: missing, or not the file of this version; restore"):
        probe.read_corpus(VOCABULARY, 128)


def test_word_states(corpus):
    """Those of a sentence in a padded batch are those of the sentence alone."""
    model = build(MaskedLanguageModel)
    states = probe.compute_word_states(model, take(corpus, 40))
    for ids, owners in zip(corpus.ids[:400:40], corpus.owners[:400:40], strict=True):
        with torch.no_grad():
            output = model.deberta(torch.tensor([ids]), torch.ones(1, len(ids)))
        for owner in set(owners) - {0}:
            expected = output.hidden_states[-1][0, torch.tensor(owners) == owner].mean(0)
            # float16 has 11 bits
            torch.testing.assert_close(states[-1, owner].float(), expected, atol=2e-3, rtol=2e-3)


def test_states_without_information_give_the_most_frequent_tag(corpus):
    model, some = build(MaskedLanguageModel), take(corpus, 10)
    with torch.no_grad():
        for parameter in model.deberta.parameters():
            parameter.zero_()
    tags = [corpus.words[owner][1] for owner, part in some.parts.items() if part == probe.TEST]
    assert probe.probe_tags(model, some)["tag_accuracy"] == pytest.approx(tags.count("nn") / len(tags))


def test_random_states_tell_some_tags(corpus):
    """Random codes of pieces tell tags of words, fewer than the words themselves."""
    figures = probe.probe_tags(build(MaskedLanguageModel), take(corpus, 4))
    assert 0.4 < figures["tag_accuracy"] < figures["word_tag_accuracy"] < 0.9


def test_the_test_part_decides_no_tie(corpus, monkeypatch):
    """Of two layers that are equally good on the second part, the first is taken, the worse one, too."""
    some = take(corpus, 10)
    tags = sorted({tag for _, tag in some.words})
    right = one_hot(torch.tensor([tags.index(tag) for _, tag in some.words])).half()
    wrong = right.clone()
    tested = [word for word, part in some.parts.items() if part == probe.TEST]
    wrong[tested] = right[tested].roll(1, 1)
    found = []
    for layers in ((right, wrong), (wrong, right)):
        monkeypatch.setattr(probe, "compute_word_states", lambda *_, layers=layers: torch.stack(layers))
        found.append(probe.probe_tags(build(MaskedLanguageModel), some))
    assert [figures["tag_layer"] for figures in found] == [0, 0]
    assert found[0]["tag_accuracy"] > found[1]["tag_accuracy"]


def solve_ridge(states, targets, penalty):
    """Return weights [h, tags] and offset of a ridge regression, by least squares over added rows."""
    center, mean = states.mean(0), targets.mean(0)
    centered = states - center
    scale = (penalty * (centered**2).sum() / states.shape[1]) ** 0.5  # relative to the mean eigenvalue
    rows = np.concatenate([centered, scale * np.eye(states.shape[1])])
    right = np.concatenate([targets - mean, np.zeros((states.shape[1], targets.shape[1]))])
    weights = np.linalg.lstsq(rows, right, rcond=None)[0]
    return weights, mean - center @ weights


@pytest.mark.parametrize(("fitted", "penalty"), [(110, 1e-2), (300, 1e-5)])
def test_ridge_regression(corpus, monkeypatch, fitted, penalty):
    """Layer, penalty and accuracy are those of a naive search: few words, many noisy states, far from 0."""
    some = take(corpus, 10)
    words = list(some.parts)
    tags = sorted({tag for _, tag in some.words})
    numbers = np.array([tags.index(tag) for _, tag in some.words])
    generator = np.random.default_rng(5)
    codes = generator.normal(size=(2, len(tags), 96))
    noise = generator.normal(size=(2, len(some.words), 96)) * np.linspace(0.1, 6, 96)
    noise[0] *= 1.2
    layers = torch.from_numpy(3 * (codes[:, numbers] + noise + 5)).half()
    monkeypatch.setattr(probe, "compute_word_states", lambda *_: layers)
    fit, choose, test = ([w for w in words if some.parts[w] == part] for part in (0, 1, 2))
    fit = fit[:fitted]
    some = some._replace(parts={word: some.parts[word] for word in (*fit, *choose, *test)})
    targets, best = np.eye(len(tags))[numbers[fit]], (-1.0, 0.0, 0, 0.0)
    for layer, states in enumerate(layers.double().numpy()):
        for each in (10.0**power for power in range(-5, 2)):
            weights, offset = solve_ridge(states[fit], targets, each)
            chosen, tested = (
                ((states[part] @ weights + offset).argmax(1) == numbers[part]).mean()
                for part in (choose, test)
            )
            best = max(best, (chosen, tested, layer, each), key=lambda found: found[0])
    assert best[2:] == (1, penalty)
    figures = probe.probe_tags(build(MaskedLanguageModel), some)
    assert figures["tag_layer"] == best[2]
    assert figures["tag_accuracy"] == pytest.approx(best[1], abs=2.5 / len(test))  # float32 scores


def test_most_frequent_tag_per_word(corpus):
    """Of the first part of the documents; words that it lacks are nouns. A naive count of both."""
    some = take(corpus, 10)
    seen = [corpus.words[word] for word, part in some.parts.items() if part == probe.FIT]
    right = []
    for word, part in some.parts.items():
        if part == probe.TEST:
            text, tag = corpus.words[word]
            tags = [other for spelled, other in seen if spelled == text]
            # Of equally frequent ones, the first in the text.
            right.append(tag == (max(dict.fromkeys(tags), key=tags.count) if tags else "nn"))
    found = probe.probe_tags(build(MaskedLanguageModel), some)["word_tag_accuracy"]
    assert found == pytest.approx(sum(right) / len(right))


def test_pairs_are_balanced(corpus):
    """A head that always prefers the singular, whatever the sentence, has one half."""
    tokenizer, model = Tokenizer(VOCABULARY), build(MaskedLanguageModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for form in ("is", "was", "has"):
            model.lm_predictions.lm_head.bias[tokenizer.piece_to_id[f"▁{form}"]] = 1.0
    figures = probe.probe_pairs(model, corpus, tokenizer)
    assert figures["pair_accuracy"] == 0.5
    assert figures["pairs"] == 1200
    assert figures["pair_margin"] == pytest.approx(1.96 * (0.25 / 1200) ** 0.5)


@pytest.mark.parametrize("length", [16, 32])
def test_pairs_of_short_sequences_are_balanced(length):
    """A model for few positions sees fewer sentences, and of them fewer of one number."""
    tokenizer = Tokenizer(VOCABULARY)
    pairs = probe.list_pairs(probe.read_corpus(VOCABULARY, length), tokenizer)
    verbs = Counter(tokenizer.pieces[wrong] for _, _, wrong in pairs)
    assert sorted(verbs) == sorted(f"▁{form}" for form in probe.OTHER_NUMBER.values())
    for singular, plural in (("is", "are"), ("was", "were"), ("has", "have")):
        assert verbs[f"▁{singular}"] == verbs[f"▁{plural}"]
    assert len(pairs) < 1200


def test_without_pairs_there_is_no_figure():
    nothing = probe.Corpus([("", "")], {}, [], [])
    assert probe.probe_pairs(build(MaskedLanguageModel), nothing, Tokenizer(VOCABULARY)) == {"pairs": 0}


def test_verbs_of_the_pairs(corpus):
    """An infinitive is none: "has" is wrong after "to" whatever the number."""
    tokenizer = Tokenizer(VOCABULARY)
    before = []
    for ids, position, wrong in probe.list_pairs(corpus, tokenizer):
        right = tokenizer.pieces[ids[position]]
        assert {right, tokenizer.pieces[wrong]} in ({"▁is", "▁are"}, {"▁was", "▁were"}, {"▁has", "▁have"})
        if right == "▁have":
            before.append(tokenizer.pieces[ids[position - 1]])
    assert len(before) > 100
    assert (
        sum(piece in ("▁to", "▁will", "▁would", "▁could") for piece in before) <= 1
    )  # "good will" is a noun


def test_a_detector_that_knows_one_verb(corpus):
    """A discriminator that finds "are", "were" and "have" replaced is right where they are wrong."""
    tokenizer, model = Tokenizer(VOCABULARY), build(ReplacedTokenDetectionModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Zero weights in the layers leave the embeddings as they are; the head reads the first coordinate.
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(1.0)
        table = model.deberta.embeddings.word_embeddings.weight
        table[:, 1] = 1.0
        for form in ("are", "were", "have"):
            table[tokenizer.piece_to_id[f"▁{form}"], 0] = 1.0
        model.mask_predictions.dense.weight.copy_(torch.eye(32))
        model.mask_predictions.classifier.weight[0, 0] = 1.0
    assert probe.probe_pairs(model, corpus, tokenizer)["pair_accuracy"] == 0.5


@pytest.mark.parametrize(("favors_right", "expected"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("kind", [MaskedLanguageModel, ReplacedTokenDetectionModel])
def test_a_model_that_knows_all_verbs(corpus, monkeypatch, kind, favors_right, expected):
    """The LM head prefers the verb and sees [MASK] there; the detector finds the other one replaced."""
    tokenizer, model = Tokenizer(VOCABULARY), build(kind)
    sentences = {tuple(ids) for ids, _, _ in probe.list_pairs(corpus, tokenizer)}
    sign = 1.0 if favors_right else -1.0

    def forward(ids, mask, labels):
        assert (ids[labels > 0] == tokenizer.mask_id).all()
        restored = torch.where(labels > 0, labels, ids)
        assert all(tuple(row[m > 0].tolist()) in sentences for row, m in zip(restored, mask, strict=True))
        right = labels[labels > 0]
        logits = torch.zeros(len(right), model.config.vocab_size)
        logits[torch.arange(len(right)), right] = sign
        return SimpleNamespace(logits=logits)

    def compute_logits(ids, mask, _):
        known = [tuple(row[m > 0].tolist()) in sentences for row, m in zip(ids, mask, strict=True)]
        return -sign * torch.tensor(known, dtype=torch.float32)[:, None].expand(ids.shape)

    if kind is MaskedLanguageModel:
        monkeypatch.setattr(model, "forward", forward)
    else:
        monkeypatch.setattr(model, "compute_logits", compute_logits)
    assert probe.probe_pairs(model, corpus, tokenizer)["pair_accuracy"] == expected


def test_command(prepared, tmp_path, monkeypatch, capsys):
    """Figures of all steps in probe.jsonl and in the report; of a model directory in the log."""
    monkeypatch.setattr(probe, "read_corpus", lambda *key, read=probe.read_corpus: take(read(*key), 20))
    flags = tiny_flags(tmp_path, prepared)
    status, output = run(flags)
    assert status == 0, output
    run_dir = flags["output_dir"]
    assert probe.main([str(run_dir), "--step", "4"]) == 0
    (line,) = map(json.loads, (run_dir / "probe.jsonl").read_text().splitlines())
    assert line["step"] == 4
    names = {"tag_accuracy", "random_tag_accuracy", "word_tag_accuracy", "pair_accuracy", "pair_margin"}
    assert {f"{model}_{name}" for model in ("generator", "discriminator") for name in names} <= set(line)
    assert probe.main([str(run_dir), "--all_steps"]) == 0
    lines = [json.loads(text) for text in (run_dir / "probe.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 2, 6]
    assert lines[0] == line
    assert "Probes of grammar" in format_page([read_run(run_dir)])
    # A line that a crash truncated takes no other with it, and a damaged checkpoint stops no other.
    (run_dir / "probe.jsonl").write_text('{"step": 2, "gen')
    with (get_checkpoint_path(run_dir, 2) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert probe.main([str(run_dir), "--all_steps"]) == 0
    assert [line["step"] for line in read_lines(run_dir / "probe.jsonl")] == [4, 6]
    assert "model.safetensors has " in capsys.readouterr().err
    assert probe.main([str(run_dir), "--step", "2"]) == 1
    assert probe.main([str(run_dir / "discriminator"), "--step", "2"]) == 2
    assert "give that of a run" in capsys.readouterr().err

    capsys.readouterr()
    assert probe.main([str(run_dir / "discriminator")]) == 0
    assert f"tag_accuracy {lines[-1]['discriminator_tag_accuracy']:.4g}" in capsys.readouterr().err
    (run_dir / "probe.jsonl").unlink()
    os.mkfifo(run_dir / "probe.jsonl")
    assert probe.main([str(run_dir), "--step", "4"]) == 1
    assert f"cannot write {run_dir}/probe.jsonl: " in capsys.readouterr().err
    shutil.rmtree(run_dir / "checkpoints")
    assert probe.main([str(run_dir)]) == 1
    assert "no checkpoints" in capsys.readouterr().err
    assert probe.main([str(run_dir), "--step", "2", "--all_steps"]) == 2
