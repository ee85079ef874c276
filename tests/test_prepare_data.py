"""The command prepare_data.py: what it prints, its flags, and its errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa import prepare_data
from DeBERTa.data import corpus
from DeBERTa.data.token_store import get_store_path, open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.files import open_partial
from tests.conftest import strip_times
from tests.data.texts import prepare

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "prepare"
VOCABULARY = GOLDEN / "spm.model"
TEXT = (GOLDEN / "input.txt").read_text()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def build_command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]


def test_preparing_does_not_load_torch():
    """It would cost two seconds and 200 MB in every process."""
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_second_run_waits_and_uses_what_the_first_made(tmp_path):
    output, elsewhere = tmp_path / "train.txt", tmp_path / "elsewhere.txt"
    arguments = build_command("-i", GOLDEN / "input.txt", "-o", output, "--vocab_path", VOCABULARY)
    with open_partial(output):  # as the first run does
        second = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "waiting for another process that writes" in second.stderr.readline()
        prepare(GOLDEN / "input.txt", elsewhere, VOCABULARY, workers=1)
        elsewhere.rename(output)
        get_store_path(elsewhere).rename(get_store_path(output))
    out, errors = second.communicate()
    assert second.returncode == 0
    assert out == ""
    assert "up to date" in errors
    assert "error" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "train.txt.ids"]


def test_any_text_file(tmp_path):
    arguments = ("-i", GOLDEN / "input.txt", "-o", tmp_path / "new" / "o.txt", "--max_seq_length", 64)
    run = subprocess.run(
        build_command(*arguments, "--vocab_path", VOCABULARY), capture_output=True, text=True, check=True
    )
    assert (tmp_path / "new" / "o.txt").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
    counts = f"{tmp_path / 'new' / 'o.txt'}: 75 lines, 4,612 tokens"
    for expected in (counts, "MB/s", f"vocabulary: {VOCABULARY}"):
        assert expected in run.stderr
    assert "preparing o.txt: 100%" in run.stderr


def test_the_sample_with_a_trained_vocabulary(cache, capsys):
    arguments = ["--corpus", "sample", "--max_seq_length", "128", "--train_vocab", "1000"]
    assert prepare_data.main(arguments) == 0
    tokenizer = Tokenizer(cache / "sample" / "spm.model")
    assert len(tokenizer) == 1001
    stores = {
        split: open_store(cache / "sample" / "128" / f"{split}.txt", tokenizer, 126)
        for split in corpus.SPLITS
    }
    assert len(stores["train"]) > 10 * len(stores["test"]) > 0 < len(stores["valid"])
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert prepare_data.main(arguments) == 0
    assert capsys.readouterr().err.count("up to date") == 3
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == files

    assert prepare_data.main([*arguments[:-1], "1200"]) == 1
    assert "cannot write a vocabulary to" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == files


def test_a_vocabulary_trained_next_to_the_output(tmp_path, capsys):
    arguments = ["-i", str(GOLDEN / "input.txt"), "-o", str(tmp_path / "o.txt"), "--train_vocab", "300"]
    assert prepare_data.main(arguments) == 0
    assert len(Tokenizer(tmp_path / "spm.model")) == 301
    trained = (tmp_path / "spm.model").read_bytes()
    # As if killed before the record was written: the same text gives the same bytes.
    (tmp_path / "spm.model.json").unlink()
    assert prepare_data.main(arguments) == 0
    assert (tmp_path / "spm.model").read_bytes() == trained
    assert (tmp_path / "spm.model.json").exists()
    (tmp_path / "spm.model").write_bytes(VOCABULARY.read_bytes())
    assert prepare_data.main(arguments) == 1
    assert "cannot write a vocabulary to" in capsys.readouterr().err
    assert (tmp_path / "spm.model").read_bytes() == VOCABULARY.read_bytes()


def test_standard_input_into_splits(tmp_path):
    """What a stream of documents is piped to; it is never up to date."""
    records = "".join(json.dumps({"content": f"Number {n}. {TEXT[n : n + 80]}"}) + "\n" for n in range(300))
    arguments = ("-i", "-", "-o", tmp_path, "--column", "content", "--valid_fraction", 0.1)
    arguments += ("--test_fraction", 0.1, "--max_seq_length", 64, "--vocab_path", VOCABULARY)
    for _ in range(2):
        run = subprocess.run(
            build_command(*arguments), input=records, capture_output=True, text=True, check=True
        )
        assert "MB/s" in run.stderr
    names = [f"{split}.txt{end}" for split in sorted(corpus.SPLITS) for end in ("", ".ids")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    run = subprocess.run(
        build_command(*arguments, "--train_vocab", 300),
        input=records,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "it can be read only once" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_split_without_documents_leaves_nothing(tmp_path, capsys):
    (tmp_path / "i").write_text("one\ntwo\n")
    output = tmp_path / "new" / "d"
    arguments = ["-i", tmp_path / "i", "-o", output, "--valid_fraction", 0.01, "--vocab_path", VOCABULARY]
    assert prepare_data.main(list(map(str, arguments))) == 1
    assert "no document of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_one_fraction_makes_one_more_split(tmp_path, split):
    (tmp_path / "i").write_text("\n".join(f"{n}. {TEXT[n : n + 80]}".replace("\n", " ") for n in range(300)))
    arguments = ["-i", str(tmp_path / "i"), "-o", str(tmp_path / "d"), f"--{split}_fraction", "0.1"]
    assert prepare_data.main([*arguments, "--train_vocab", "300"]) == 0
    names = {f"{name}.txt{end}" for name in ("train", split) for end in ("", ".ids")}
    assert {path.name for path in (tmp_path / "d").iterdir()} == names | {"spm.model", "spm.model.json"}


def test_parts_of_several_machines_train_as_one_text(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"This is text number {number}. {TEXT}")
    arguments = ["-i", str(folder), "-o", str(tmp_path / "train.txt"), "--vocab_path", str(VOCABULARY)]
    arguments += ["--workers", "1"]
    for number in (2, 0, 1):
        assert prepare_data.main([*arguments, "--shard", f"{number}/3"]) == 0
    parts = sorted((tmp_path / "train.txt").glob("*.txt"))
    assert [part.name for part in parts] == [f"{number:05}-of-00003.txt" for number in range(3)]
    store = open_store(tmp_path / "train.txt", Tokenizer(VOCABULARY), 510)
    assert len(store) == sum(len(part.read_text().splitlines()) for part in parts)
    text = "".join(parts[1].read_text().split()).replace("▁", " ")
    assert [number for number in range(5) if f"text number {number}." in text] == [1, 4]
    assert prepare_data.main([*arguments, "--shard", "1/3"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert prepare_data.main([*arguments, "--shard", "0/6"]) == 1
    assert "cannot make 6 parts of 5 input files" in capsys.readouterr().err


def test_parts_with_a_validation_split(tmp_path):
    """Each machine splits its documents as it would alone."""
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = ["--valid_fraction", "0.1", "--vocab_path", str(VOCABULARY), "--workers", "1"]
    for number in range(2):
        lines = (f"{number} {n}. {TEXT[n : n + 80]}".replace("\n", " ") for n in range(150))
        (folder / f"{number}.txt").write_text("\n".join(lines))
        alone = ["-i", str(folder / f"{number}.txt"), "-o", str(tmp_path / f"alone-{number}")]
        assert prepare_data.main([*alone, *arguments]) == 0
    for number in range(2):
        shard = ["-i", str(folder), "-o", str(tmp_path / "both"), "--shard", f"{number}/2"]
        assert prepare_data.main([*shard, *arguments]) == 0
    for split in ("train", "valid"):
        parts = sorted((tmp_path / "both" / f"{split}.txt").glob("*.txt"))
        alone = [tmp_path / f"alone-{number}" / f"{split}.txt" for number in range(2)]
        assert [part.read_bytes() for part in parts] == [path.read_bytes() for path in alone]


def test_check_reports_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("i.txt").write_text("Straße \u200bhidden\x07 ﬁne 漢 漢\n\n" + TEXT, encoding="utf-8")
    assert prepare_data.main(["-i", "i.txt", "--check", "--vocab_path", str(VOCABULARY)]) == 0
    report = capsys.readouterr().err
    for line in (
        r"vocabulary .*spm\.model: 2001 pieces",
        r"text: \d+ documents, [\d,]+ words, [\d,]+ pieces, \d\.\d\d pieces per word",
        r"\[UNK\]: \d+ \(\d\.\d+% of the pieces\): .*漢 \(2\)",
        r"normalization removes: \d+: .*U\+200B ZERO WIDTH SPACE",
        r"normalization changes: \d+: .*ﬁ to fi",
        r" +\d+ to +\d+: \d+",
    ):
        assert re.search(line, report), line
    assert [path.name for path in tmp_path.iterdir()] == ["i.txt"]


def test_check_counts_documents_whatever_their_length(tmp_path, monkeypatch, capsys):
    """Those of 200 kB are not cut, in text as in JSON lines."""
    monkeypatch.chdir(tmp_path)
    documents = [f"{number} {' '.join(TEXT.split())[:20_000]}" for number in range(4)]
    documents = ["\n".join([document] * 10) for document in documents]
    Path("i.txt").write_text("\n\n".join(documents), encoding="utf-8")
    Path("i.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    reports = []
    for name in ("i.txt", "i.jsonl"):
        assert prepare_data.main(["-i", name, "--check", "--vocab_path", str(VOCABULARY)]) == 0
        reports.append(strip_times(capsys.readouterr().err).partition("text: ")[2])
    assert reports[0].startswith("4 documents")
    assert reports[0] == reports[1]


@pytest.mark.parametrize("fractions", [[], ["--valid_fraction", "0.2"]])
def test_outputs_below_the_input_are_no_input(tmp_path, monkeypatch, capsys, fractions):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/i.txt").write_text(TEXT, encoding="utf-8")
    output = "in/out" if fractions else "in/out/train.txt"
    arguments = ["-i", "in", "-o", output, "--train_vocab", "400", *fractions]
    assert prepare_data.main(arguments) == 0
    written = {path: path.read_bytes() for path in Path("in/out").iterdir()}
    assert prepare_data.main(arguments) == 0
    assert "up to date" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("in/out").iterdir()} == written


@pytest.mark.parametrize("given", ["in", "in/*"])
def test_an_output_in_the_directory_of_the_input(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/i.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["-i", given, "-o", "in/train.txt", "--train_vocab", "400"]
    for _ in range(2):
        assert prepare_data.main(arguments) == 0
    assert "up to date" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "in", "-o", "in/train.txt"],
        ["-i", "in/*", "-o", "in/train.txt"],
        ["-i", "in", "-o", "in", "--valid_fraction", "0.2"],
        ["-i", "in", "-o", "in/link.txt"],
        ["-i", "alone", "-o", "alone/train.txt"],
    ],
)
def test_raw_text_below_the_input_is_never_overwritten(tmp_path, monkeypatch, capsys, arguments):
    """Although the output has its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/i.txt", "in/train.txt", "in/valid.txt", "alone/train.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"{name}\n\n{TEXT}", encoding="utf-8")
    Path("in/link.txt").symlink_to("i.txt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert prepare_data.main([*arguments, "--vocab_path", str(VOCABULARY)]) == 1
    assert "it is also the input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_parts_below_the_input(tmp_path, monkeypatch, capsys):
    """Those of other nodes are no input; parts next to the input are refused."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in "ab":
        Path(f"in/{name}.txt").write_text(f"{name} {TEXT}", encoding="utf-8")
    arguments = ["-i", "in", "-o", "in/parts", "--vocab_path", str(VOCABULARY)]
    for number in (0, 1, 0):
        assert prepare_data.main([*arguments, "--shard", f"{number}/2"]) == 0
    assert "up to date" in capsys.readouterr().err
    for number, name in enumerate("ab"):
        alone = tmp_path / f"{name}.txt"
        prepare(tmp_path / "in" / f"{name}.txt", alone, VOCABULARY, workers=1)
        assert Path(f"in/parts/0000{number}-of-00002.txt").read_bytes() == alone.read_bytes()
    arguments[3] = "in"
    assert prepare_data.main([*arguments, "--shard", "0/2"]) == 1
    assert "cannot write parts to in: it also holds input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-i", "missing.txt", "-o", "o", "--vocab_path", str(VOCABULARY)], "no text file missing.txt"),
        (["-i", "i", "-o", "o", "--vocab_path", "missing.model"], "vocabulary missing.model"),
        (["-i", "i", "-o", "o", "--vocab_path", "i"], "i is not a SentencePiece model"),
        (["-i", "i", "-o", "./i", "--vocab_path", str(VOCABULARY)], "it is also the input"),
        (["-i", "i", "-o", "v", "--vocab_path", "v"], "it is also the vocabulary"),
        (["-i", "i", "-o", "i/o", "--vocab_path", str(VOCABULARY)], "i: "),
        (["-i", "i", "-o", ".", "--vocab_path", str(VOCABULARY)], "it is a directory"),
        (["-i", "i", "-o", "o", "--train_vocab", "5000"], "too little text"),
        (["--wikitext", "missing.zip"], "no archive missing.zip"),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    Path("i").write_text("some text\n")
    Path("v").write_bytes(VOCABULARY.read_bytes())
    assert prepare_data.main(arguments) == 1
    errors = capsys.readouterr().err
    assert complaint in errors
    assert strip_times(errors).splitlines()[-1].startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "v"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "i"],
        ["-o", "o"],
        ["-i", "i", "-o", "o", "--corpus", "sample"],
        ["--corpus", "sample", "--wikitext", "z.zip"],
        ["--corpus", "other"],
        ["--workers", "0"],
        ["--workers", "100000"],
        ["--max_seq_length", "2"],
        ["--max_seq_length", "99999999999999999999"],
        ["-i", "i", "-o", "o", "--train_vocab", "99999999999999999999"],
        ["-i", "i", "-o", "o", "--valid_fraction", "nan"],
        ["-i", "i", "-o", "o", "--test_fraction", "nan"],
        ["-i", "i", "-o", "o", "--shard", "3/3"],
        ["-i", "i", "-o", "o", "--valid_fraction", "0.5", "--test_fraction", "0.5"],
        ["-i", "i", "--check", "--shard", "0/2"],
        ["--corpus", "sample", "--shard", "0/2"],
        ["-i", "i", "-o", "o", "--character_coverage", "0.5"],
        ["-i", "i", "-o", "o", "--vocab", "v"],
        ["-i", "i", "--check", "--train_vocab", "300"],
    ],
)
def test_wrong_flags(arguments, capsys):
    assert prepare_data.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "error: " in error


def test_no_network(cache, tmp_path):
    code = (
        "import sys; from DeBERTa.data import corpus; from DeBERTa.prepare_data import main;"
        "corpus.WIKITEXT_103.urls = ('http://127.0.0.1:9/a.zip', 'http://127.0.0.1:9/b.zip');"
        "sys.exit(main([]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    for failure in ("9/a.zip: ", "9/b.zip: ", "cannot fetch spm.model of hf:microsoft/deberta-v3-base: "):
        assert failure in result.stderr
    for destination in ("wikitext-103/wikitext-103-v1.zip", "deberta-v3-base/spm.model"):
        assert f"put the file at {cache / destination} by hand" in result.stderr
