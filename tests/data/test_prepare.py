"""Preparing text: the published bytes, unusual input, interruption, memory."""

import gzip
import hashlib
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from DeBERTa.data import corpus
from DeBERTa.data.files import open_partial
from DeBERTa.data.prepare import prepare
from DeBERTa.data.text import TextFile, read_training_sentences, split_lines
from DeBERTa.data.token_store import find_store, get_store_path, open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, VocabularyError
from DeBERTa.log import set_up_logging
from tests.conftest import strip_times
from tests.processes import children, is_running

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "prepare"
VOCABULARY = GOLDEN / "spm.model"
TOKENIZER = Tokenizer(VOCABULARY)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]


def straightforward(content: str, width: int) -> str:
    """Return the output by definition: pieces of each line in one list, then split."""
    ids = [index for line in content.split("\n") for index in TOKENIZER.encode_lines([line])[0]]
    pieces = [TOKENIZER.pieces[index] for index in ids]
    return "".join(" ".join(pieces[start : start + width]) + "\n" for start in range(0, len(pieces), width))


def sample_megabytes(count: int) -> bytes:
    text = lzma.decompress(corpus.SAMPLE.read_bytes())
    return (text * (count // 10 + 1))[: count * 1_000_000].rpartition(b"\n")[0] + b"\n"


@pytest.mark.parametrize(("workers", "block_bytes"), [(1, 1 << 20), (1, 3000), (2, 3000), (2, 1 << 20)])
def test_the_published_output(tmp_path, workers, block_bytes):
    output = tmp_path / "train.txt"
    result = prepare(GOLDEN / "input.txt", output, VOCABULARY, 64, workers=workers, block_bytes=block_bytes)
    expected = (GOLDEN / "expected_64.txt").read_bytes()
    assert output.read_bytes() == expected
    assert (result.lines, result.num_tokens, result.input_bytes) == (75, 4612, 18167)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "train.txt.ids"]
    assert find_store(output).meta.text_sha256 == hashlib.sha256(expected).hexdigest()


def test_the_store_holds_the_ids_of_the_text(tmp_path):
    output = tmp_path / "train.txt"
    prepare(GOLDEN / "input.txt", output, VOCABULARY, 64, workers=1, block_bytes=1000)
    made = get_store_path(output).stat().st_mtime_ns
    written = open_store(output, TOKENIZER, 62)
    assert get_store_path(output).stat().st_mtime_ns == made
    copy = tmp_path / "copy.txt"
    copy.write_bytes(output.read_bytes())
    read = open_store(copy, TOKENIZER, 62)
    assert np.array_equal(written.tokens, read.tokens)
    assert np.array_equal(written.offsets, read.offsets)
    for name in ("lines", "num_tokens", "longest", "longest_line", "unknown", "text_sha256"):
        assert getattr(written.meta, name) == getattr(read.meta, name), name


@pytest.mark.parametrize("width", [1, 2, 62, 510, 4612, 5000])
def test_every_width(tmp_path, width):
    prepare(GOLDEN / "input.txt", tmp_path / "o", VOCABULARY, width + 2, workers=1, block_bytes=777)
    assert (tmp_path / "o").read_text() == straightforward((GOLDEN / "input.txt").read_text(), width)
    assert open_store(tmp_path / "o", TOKENIZER, width).meta.lines == -(-4612 // width)


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"Without newline at the end", "Without newline at the end"),
        (b"One line\r\nand another\r\n", "One line\nand another"),
        (b"old line\rends\r", "old line\nends"),
        (b"\xef\xbb\xbfAfter a mark", "After a mark"),
        (b"NUL \x00 inside, \x00", "NUL \x00 inside, \x00"),
        ("no\u2028line \u0085end\x0b\x0c\x1c here".encode(), "no\u2028line \u0085end\x0b\x0c\x1c here"),
        (b"\n\n  \n\nblank lines\n\n", "blank lines"),
        ("漢字 ß [MASK] [UNK] ▁the".encode(), "漢字 ß [MASK] [UNK] ▁the"),
    ],
)
def test_unusual_text(tmp_path, content, meaning):
    (tmp_path / "i").write_bytes(content)
    prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 8, workers=1)
    assert (tmp_path / "o").read_text() == straightforward(meaning, 6)


@pytest.mark.parametrize(("name", "pack"), [("text.gz", gzip.compress), ("text.xz", lzma.compress)])
def test_compressed_text(tmp_path, name, pack):
    packed = pack((GOLDEN / "input.txt").read_bytes())
    (tmp_path / name).write_bytes(packed)
    prepare(tmp_path / name, tmp_path / "o", VOCABULARY, 64, workers=1)
    assert (tmp_path / "o").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
    (tmp_path / name).write_bytes(packed[:-100])
    with pytest.raises(DataError, match="not a complete"):
        prepare(tmp_path / name, tmp_path / "p", VOCABULARY, 64, workers=1)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_utf8(tmp_path, workers):
    good = b"\xef\xbb\xbf" + "Straße und mehr\n".encode() * 400
    (tmp_path / "i").write_bytes(good + b"bad \xff byte\n" + good)
    with pytest.raises(DataError, match=rf"byte {len(good) + 4}:.*--errors replace"):
        prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 64, workers=workers, block_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["i"]
    prepare(
        tmp_path / "i", tmp_path / "o", VOCABULARY, 64, errors="replace", workers=workers, block_bytes=1000
    )
    expected = straightforward((tmp_path / "i").read_text(encoding="utf-8-sig", errors="replace"), 62)
    assert (tmp_path / "o").read_text().split() == expected.replace("\ufeff", "").split()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no text"),
        (b"\n \r\n", "has no text"),
        ("Hello".encode("utf-16"), "UTF-16"),
        (("Hello you there. " * 20).encode("utf-16-le"), "UTF-16"),
    ],
)
def test_text_that_is_refused(tmp_path, content, complaint):
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 64, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


def test_a_failed_run_keeps_the_older_output(tmp_path):
    prepare(GOLDEN / "input.txt", tmp_path / "o", VOCABULARY, 64, workers=1)
    (tmp_path / "i").write_bytes(b"fine\n" * 1000 + b"\xff")
    with pytest.raises(DataError):
        prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 64, workers=1, block_bytes=500)
    assert (tmp_path / "o").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
    assert prepare(GOLDEN / "input.txt", tmp_path / "o", VOCABULARY, 64, workers=1).seconds is None


def test_blocks_hold_all_text_and_end_well(tmp_path):
    content = (
        "Zeile mit Straße\r\n" * 50 + "漢字" * 400 + "\r" + "wort " * 500 + "x" * 900 + "\n\nend"
    ).encode()
    (tmp_path / "i").write_bytes(content)
    for block_bytes in (7, 64, 1000, len(content), len(content) + 1):
        blocks = list(TextFile(tmp_path / "i").read_blocks(block_bytes))
        assert b"".join(block for _, block in blocks) == content
        assert all(0 < len(block) <= block_bytes for _, block in blocks)
        assert [offset for offset, _ in blocks] == [
            sum(len(block) for _, block in blocks[:index]) for index in range(len(blocks))
        ]
        for _, block in blocks:
            block.decode()


def test_long_lines_are_split_where_pieces_end(tmp_path):
    line = b" ".join([*(GOLDEN / "input.txt").read_bytes().split()] * 40)
    assert max(map(len, split_lines(line))) <= 64 << 10
    (tmp_path / "i").write_bytes(line)
    prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 64, workers=1)
    assert (tmp_path / "o").read_text() == straightforward(line.decode(), 62)


MEASURED = """
import re, resource, sys
import prepare_data
status = prepare_data.main(sys.argv[1:])
# Not RUSAGE_SELF: that begins with the size of the process that started this one.
own = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print("peak", (own + 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
sys.exit(status)
"""


@pytest.mark.parametrize("separator", [b"\n", b" ", b""], ids=["lines", "one-line", "one-word"])
def test_memory_does_not_grow_with_the_text(tmp_path, separator):
    """Measured over this process and two workers, each counted as the larger one."""
    text = sample_megabytes(20).replace(b"\n", separator)
    if not separator:
        text = text.replace(b" ", b"")
    (tmp_path / "i").write_bytes(text)
    arguments = ["-i", tmp_path / "i", "-o", tmp_path / "o", "--vocab_path", VOCABULARY, "--workers", "2"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(run.stdout.split("peak ")[1])
    assert peak < 500_000_000
    assert open_store(tmp_path / "o", TOKENIZER, 510).meta.num_tokens > 3_000_000


def test_preparing_does_not_load_torch():
    """It would cost two seconds and 200 MB in every process."""
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def start_and_wait_for_output(text: Path, output: Path) -> subprocess.Popen:
    arguments = command("-i", text, "-o", output, "--vocab_path", VOCABULARY, "--workers", "2")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        arguments,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # A shell that runs tests in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial = output.with_name(output.name + ".part")
    while not partial.exists() or partial.stat().st_size == 0:
        assert process.poll() is None, process.stderr.read()
    return process


def test_a_killed_run_leaves_nothing_and_is_finished_by_the_next(tmp_path):
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert not output.exists()
    assert not get_store_path(output).exists()
    while any(is_running(worker) for worker in workers):
        pass  # they end with their parent; the test run's own limit catches it if not

    prepare(text, output, VOCABULARY, workers=2)
    prepare(text, tmp_path / "undisturbed.txt", VOCABULARY, workers=1)
    assert output.read_bytes() == (tmp_path / "undisturbed.txt").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["train.txt", "train.txt.ids"]


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_killed_at_some_moment_and_run_again(tmp_path, moment):
    """SIGKILL while the output is written; tests/slow has twenty random moments."""
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    prepare(text, tmp_path / "undisturbed.txt", VOCABULARY, workers=2)
    expected = (tmp_path / "undisturbed.txt").read_bytes()
    process = start_and_wait_for_output(text, output)
    partial = output.with_name(output.name + ".part")
    while partial.exists() and partial.stat().st_size < moment * len(expected):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not output.exists()
    prepare(text, output, VOCABULARY, workers=2)
    assert output.read_bytes() == expected
    assert sorted(path.name for path in output.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_an_interrupted_run(tmp_path):
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("interrupted; run the same command again to finish\n")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("while_sending", [False, True])
def test_a_worker_that_dies(tmp_path, while_sending):
    """Also in the middle of sending a result."""
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    if while_sending:  # the main process receives nothing, so that results fill the pipe
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
    for child in children(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():  # not the tracker of semaphores
            os.kill(child, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in errors
    assert "Traceback" not in errors
    assert list(output.parent.iterdir()) == []


def test_up_to_date(tmp_path):
    text, output = tmp_path / "i", tmp_path / "o"
    text.write_bytes((GOLDEN / "input.txt").read_bytes())

    def run(**options) -> bool:
        """Whether anything was made."""
        before = output.stat().st_mtime_ns if output.exists() else None
        result = prepare(text, output, VOCABULARY, **{"max_seq_length": 64, "workers": 1} | options)
        assert (result.seconds is None) == (output.stat().st_mtime_ns == before)
        return result.seconds is not None

    assert run()
    assert not run()
    assert run(max_seq_length=32)
    assert run(max_seq_length=64)
    assert run(errors="replace")
    assert run()
    text.write_bytes(text.read_bytes() + b"more\n")
    assert run()
    output.write_text("▁other\n")
    assert run()
    output.unlink()
    assert run()
    assert not run()


def test_a_second_run_waits_and_uses_what_the_first_made(tmp_path):
    output, elsewhere = tmp_path / "train.txt", tmp_path / "elsewhere.txt"
    arguments = command("-i", GOLDEN / "input.txt", "-o", output, "--vocab_path", VOCABULARY)
    with open_partial(output):  # as the first run does
        second = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "waiting for another process that writes" in second.stderr.readline()
        prepare(GOLDEN / "input.txt", elsewhere, VOCABULARY, workers=1)
        elsewhere.rename(output)
        get_store_path(elsewhere).rename(get_store_path(output))
    out, errors = second.communicate()
    assert second.returncode == 0
    assert out == "" and "up to date" in errors and "error" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "train.txt.ids"]


def test_command_line_with_an_own_text(tmp_path):
    arguments = ("-i", GOLDEN / "input.txt", "-o", tmp_path / "new" / "o.txt", "--max_seq_length", 64)
    run = subprocess.run(
        command(*arguments, "--vocab_path", VOCABULARY), capture_output=True, text=True, check=True
    )
    assert (tmp_path / "new" / "o.txt").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
    for part in (
        str(tmp_path / "new" / "o.txt"),
        "75 lines",
        "4,612 tokens",
        "MB/s",
        f"vocabulary: {VOCABULARY}",
    ):
        assert part in run.stderr
    assert "preparing o.txt: 100%" in run.stderr


def test_the_sample_with_its_own_vocabulary(cache, capsys):
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


def test_an_own_vocabulary_beside_the_output(tmp_path, capsys):
    arguments = ["-i", str(GOLDEN / "input.txt"), "-o", str(tmp_path / "o.txt"), "--train_vocab", "300"]
    assert prepare_data.main(arguments) == 0
    assert len(Tokenizer(tmp_path / "spm.model")) == 301
    trained = (tmp_path / "spm.model").read_bytes()
    (
        tmp_path / "spm.model.json"
    ).unlink()  # killed before the record was written: the same text gives the same bytes
    assert prepare_data.main(arguments) == 0
    assert (tmp_path / "spm.model").read_bytes() == trained
    assert (tmp_path / "spm.model.json").exists()
    (tmp_path / "spm.model").write_bytes(VOCABULARY.read_bytes())
    assert prepare_data.main(arguments) == 1
    assert "cannot write a vocabulary to" in capsys.readouterr().err
    assert (tmp_path / "spm.model").read_bytes() == VOCABULARY.read_bytes()


def test_vocabularies_of_large_texts_see_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("DeBERTa.data.text.TRAINING_BYTES", 2 << 20)
    text = b"".join(b"%07d.\n" % number for number in range(1_000_000))
    for name, content in (("i", text), ("i.gz", gzip.compress(text, 1))):
        (tmp_path / name).write_bytes(content)
        numbers = [int(line[:7]) for line in read_training_sentences(tmp_path / name, "strict")]
        assert 1.8e6 < 9 * len(numbers) < 3.5e6
        assert min(numbers) < 200_000 and max(numbers) > 600_000
        assert numbers == sorted(set(numbers))


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
def test_one_sentence_for_what_cannot_be_done(tmp_path, monkeypatch, capsys, arguments, complaint):
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
        ["--max_seq_length", "2"],
    ],
)
def test_wrong_flags(arguments, capsys):
    assert prepare_data.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "error: " in error


def test_no_network(cache, monkeypatch, capsys):
    monkeypatch.setattr(corpus.WIKITEXT_103, "urls", ("http://127.0.0.1:9/a.zip", "http://127.0.0.1:9/b.zip"))
    monkeypatch.setattr(corpus.DEBERTA_V3_VOCABULARY, "urls", ("http://127.0.0.1:9/spm.model",))
    assert prepare_data.main([]) == 1
    errors = capsys.readouterr().err
    for address in ("9/a.zip: ", "9/b.zip: ", "9/spm.model: "):
        assert address in errors
    for destination in ("wikitext-103/wikitext-103-v1.zip", "deberta-v3-base/spm.model"):
        assert f"put the file at {cache / destination} by hand" in errors


def test_own_addresses_come_from_the_environment(cache):
    mirrors = {
        "DEBERTA_WIKITEXT_URL": "http://127.0.0.1:9/mirror.zip",
        "HF_ENDPOINT": "http://127.0.0.1:9/hub/",
    }
    code = "from DeBERTa.data import corpus; print(corpus.WIKITEXT_103.urls[0], *corpus.DEBERTA_V3_VOCABULARY.urls)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | mirrors,
        capture_output=True,
        text=True,
        check=True,
    )
    hub = "http://127.0.0.1:9/hub/microsoft/deberta-v3-base/resolve/main/spm.model"
    assert run.stdout.split() == ["http://127.0.0.1:9/mirror.zip", hub]


def test_a_vocabulary_for_prepared_text_is_checked_early(tmp_path):
    (tmp_path / "i").write_text("some text\n")
    (tmp_path / "v").write_bytes(b"no model")
    with pytest.raises(VocabularyError, match="not a SentencePiece model"):
        prepare(tmp_path / "i", tmp_path / "o", tmp_path / "v", 64)
    assert not (tmp_path / "o.part").exists()


def test_a_vocabulary_of_another_script_is_never_silent(tmp_path, capsys):
    set_up_logging()
    text = tmp_path / "i.txt"
    text.write_text("漢字 仮名 " * 1000, encoding="utf-8")
    with pytest.raises(VocabularyError, match=r"i\.txt: 50.0% of the pieces are \[UNK\]"):
        prepare(text, tmp_path / "o.txt", VOCABULARY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.txt"]
    text.write_text("the 漢 of the and of the of and the " * 300, encoding="utf-8")
    prepare(text, tmp_path / "o.txt", VOCABULARY)
    assert "% of the pieces" in capsys.readouterr().err


def test_output_that_is_not_a_file_and_links(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: it is a directory or a device"):
        prepare(GOLDEN / "input.txt", tmp_path / "pipe", VOCABULARY, 64)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "o.txt").symlink_to(tmp_path / "elsewhere" / "o.txt")
    prepare(GOLDEN / "input.txt", tmp_path / "o.txt", VOCABULARY, 64)
    assert (tmp_path / "o.txt").is_symlink()
    assert (tmp_path / "elsewhere" / "o.txt").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
