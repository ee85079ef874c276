"""Fine-tuning of a tiny exported model, on files and on an archive like that of vaderSentiment."""

import io
import json
import random
import shutil
import sys
import tarfile

import pytest
from safetensors.torch import load_file, save_file

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.hub.export import list_models, write_model
from experiments.finetune.finetune import main, read_movies
from tests.hub.exported import VOCABULARY, build_model

pytest.importorskip("transformers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the directory of a discriminator."""
    directory = tmp_path_factory.mktemp("model") / "discriminator"
    write_model(list_models(build_model("deberta-v3"))[1], directory, Tokenizer(VOCABULARY), None)
    return directory


def make_rows(number, seed):
    """Return sentences of which each has a word that decides its label."""
    draw = random.Random(seed)
    words = ("union", "state", "people", "congress", "house", "war")
    rows = []
    for _ in range(number):
        label = draw.choice(("bad", "good"))
        rows.append((" ".join([*draw.choices(words, k=3), {"bad": "peace", "good": "law"}[label]]), label))
    return rows


def test_classification(model, tmp_path, capsys):
    """TSV and JSON lines; two seeds, their mean and spread, and the baseline, which is right here."""
    train, test = tmp_path / "train.tsv", tmp_path / "test.jsonl"
    train.write_text("words\tmood\n" + "".join(f"{text}\t{label}\n" for text, label in make_rows(64, 1)))
    test.write_text("".join(json.dumps({"words": t, "mood": m}) + "\n" for t, m in make_rows(40, 2)))
    columns = ["--text", "words", "--label", "mood", "--seeds", "1", "2", "--epochs", "1"]
    output = tmp_path / "scores.json"
    files = ["--train", str(train), "--test", str(test), "--output", str(output)]
    assert main([str(model), *files, *columns]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "64 training rows, 40 test rows, 2 classes"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "seed 1", "seed 2", "mean ± standard deviation over 2 seeds", "words only"
    ]  # fmt: skip
    assert lines[4] == "words only: accuracy 1.0000  f1 1.0000  matthews 1.0000"
    values = json.loads(output.read_text())
    assert [len(scores) for scores in values["scores"].values()] == [2, 2, 2]
    assert values["words_only"]["accuracy"] == 1.0


def test_half_precision_weights_are_trained_in_full(model, tmp_path, capsys):
    """AdamW's epsilon and small updates are 0 in float16: the first update would give NaN."""
    half = shutil.copytree(model, tmp_path / "half")
    weights = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    rows = tmp_path / "rows.tsv"
    rows.write_text(HEAD + "".join(f"{text}\t{label}\n" for text, label in make_rows(64, 1)))
    flags = ["--train", str(rows), "--test", str(rows), "--epochs", "8", "--learning_rate", "5e-3"]
    assert main([str(half), *flags, "--seeds", "1"]) == 0
    assert float(capsys.readouterr().out.partition("seed 1: accuracy ")[2].split()[0]) > 0.9


def test_texts_longer_than_the_positions(tmp_path, capsys):
    """Of a model with absolute positions; and a file with a byte order mark, as spreadsheets write it."""
    write_model(list_models(build_model("bert"))[1], tmp_path / "model", Tokenizer(VOCABULARY), None)
    rows = tmp_path / "rows.tsv"
    lines = [f"{'film ' * 400}{word}\t{word}\n" for word in ("good", "bad") * 2]
    rows.write_text(HEAD + "".join(lines), encoding="utf-8-sig")
    flags = ["--train", str(rows), "--test", str(rows), "--epochs", "1", "--seeds", "1"]
    assert main([str(tmp_path / "model"), *flags, "--max_length", "512"]) == 0, capsys.readouterr().err


def test_the_directory_of_a_run(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path), "--glue", "cola"]) == 2
    assert f"{tmp_path} is the directory of a run; give that of its model" in capsys.readouterr().err


HEAD, ROWS = "text\tlabel\n", "a good film\tgood\na bad film\tbad\n"


@pytest.mark.parametrize(
    ("content", "flags", "complaint"),
    [
        (HEAD, [], "rows.tsv: no rows"),
        (HEAD + ROWS, ["--text", "words"], "row 1 has no words (but text, label); give --text and --label"),
        (HEAD + ROWS + "a film\n", [], "row 3 has no label"),
        (HEAD + ROWS, ["--task", "regression"], "'good' is no number to predict"),
        (HEAD + ROWS, [], "the baseline needs two training rows, of the same class"),
        (HEAD + "a film\tgood\n", [], "all training rows are labeled good"),
        (HEAD + 2 * "a b\tgood\nc d\tbad\n", [], "no word of two letters"),
        (HEAD + 2 * ROWS, ["--learning_rate", "nan"], "Invalid learning rate: nan"),
        (HEAD + 2 * ROWS, ["--learning_rate", "1e30"], "training diverged; lower --learning_rate"),
        ("\udcff", [], "rows.tsv: neither TSV nor JSON lines in UTF-8 ("),
    ],
)
def test_errors_are_one_line(model, tmp_path, capsys, content, flags, complaint):
    rows = tmp_path / "rows.tsv"
    rows.write_text(content, errors="surrogateescape")
    assert main([str(model), "--train", str(rows), "--test", str(rows), *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line
    assert complaint in line


def test_labels_that_training_does_not_have(tmp_path, capsys):
    for name, labels in (("train", ("old", "older")), ("test", ("new", "old"))):
        rows = (f"a text\t{label}\n" for label in labels)
        (tmp_path / f"{name}.tsv").write_text(HEAD + "".join(rows))
    flags = ["--train", str(tmp_path / "train.tsv"), "--test", str(tmp_path / "test.tsv")]
    assert main(["MODEL", *flags]) == 1
    assert "labels ['new'] of the test rows are not among those" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--epochs", "0"], "--epochs: expected a number from 1, not '0'"),
        (["--text", "a", "b", "c"], "--text: one or two columns, not 3"),
        (["--output", "none/scores.json"], "--output: there is no directory none"),
    ],
)
def test_wrong_flags(model, capsys, flags, complaint):
    assert main([str(model), "--glue", "cola", *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_rows_that_are_not_there(model, tmp_path, capsys):
    assert main([str(model), "--train", str(tmp_path / "none"), "--test", str(tmp_path)]) == 1
    complaint = f"error: cannot read {tmp_path}/none: No such file or directory; check its permissions"
    assert complaint in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--glue", "cola"]) == 2
    assert f"there is no model directory {tmp_path}/none" in capsys.readouterr().err


def test_a_directory_without_a_model(tmp_path, capsys):
    assert main([str(tmp_path), "--glue", "cola"]) == 2
    assert f"error: {tmp_path} holds no model, whose directory has a config.json" in capsys.readouterr().err


def test_an_archive_that_is_cut_off(model, tmp_path, capsys):
    archive = tmp_path / "archive.tar.gz"
    write_archive(archive)
    archive.write_bytes(archive.read_bytes()[:200])
    assert main([str(model), "--movies", str(archive)]) == 1
    assert "--movies: not a complete archive" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_scores(model, tmp_path, capsys):
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in make_rows(32, 1)))
    flags = [str(model), "--train", str(rows), "--test", str(rows), "--seeds", "5", "5", "--epochs", "2"]
    assert main([*flags, "--learning_rate", "3e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == lines[2]
    assert float(lines[1].split()[3]) > 0.8  # it learns its training rows


def write_archive(path):
    """Write an archive with the files that the source archive of vaderSentiment has."""
    rows = make_rows(200, 3)
    text = "".join(
        f"{i}\t{1.5 if label == 'good' else -0.5}\t{t} {i}\r\n" for i, (t, label) in enumerate(rows)
    )
    text += "200\t0.0\tneither\r\n"
    content, name = text.encode(), "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    for inner in (name, "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            member = tarfile.TarInfo(inner)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        content = packed.getvalue()
    path.write_bytes(content)
    return path


def test_movies(model, tmp_path, capsys):
    """Ratings by regression; their signs as classes; no sentence in both parts."""
    archive = write_archive(tmp_path / "vaderSentiment-3.3.1.tar.gz")
    train, test = read_movies(archive, is_regression=False)
    assert {row.label for row in train + test} == {"True", "False"}
    assert len(train) + len(test) == 200
    assert 20 < len(test) < 60
    assert not {row.texts for row in train} & {row.texts for row in test}
    flags = ["--movies", str(archive), "--task", "regression", "--seeds", "1", "--epochs", "1"]
    assert main([str(model), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" test rows, regression")
    assert lines[-1].startswith("words only: spearman 0.8")


def test_an_archive_without_the_sentences(tmp_path, capsys):
    path = tmp_path / "other.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    assert main(["MODEL", "--movies", str(path)]) == 1
    assert "give vaderSentiment-3.3.1.tar.gz" in capsys.readouterr().err


def test_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["MODEL", "--movies", str(tmp_path)]) == 1
    complaint = "error: the package scikit-learn is missing: pip install scikit-learn\n"
    assert capsys.readouterr().err.endswith(complaint)
