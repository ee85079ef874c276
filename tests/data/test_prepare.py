"""Preparing text: the published bytes, unusual input, interruption, memory."""

import errno
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from DeBERTa.data import corpus
from DeBERTa.data import prepare as preparation
from DeBERTa.data.encode import Recipe
from DeBERTa.data.prepare import prepare_outputs
from DeBERTa.data.sources import Reading
from DeBERTa.data.text import split_lines
from DeBERTa.data.token_store import find_store, get_store_path, open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError, VocabularyError
from DeBERTa.log import set_up_logging
from tests.data.texts import prepare
from tests.processes import is_running, list_children

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "prepare"
VOCABULARY = GOLDEN / "spm.model"
TOKENIZER = Tokenizer(VOCABULARY)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def build_command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]


def prepare_plainly(content: str, width: int) -> str:
    """Return the output by definition: pieces of each line in one list, then split."""
    ids = TOKENIZER.encode_utf8([line.encode() for line in content.split("\n")])
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
    assert (result.meta.lines, result.meta.num_tokens) == (75, 4612)
    assert result.meta.recipe["input_bytes"] == 18167
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "train.txt.ids"]
    assert find_store(output).meta.text_sha256 == hashlib.sha256(expected).hexdigest()


def test_the_store_holds_the_ids_of_the_text(tmp_path):
    output = tmp_path / "train.txt"
    prepare(GOLDEN / "input.txt", output, VOCABULARY, 64, workers=1, block_bytes=1000)
    made = get_store_path(output).stat().st_mtime_ns
    (written,) = open_store(output, TOKENIZER, 62).files
    assert get_store_path(output).stat().st_mtime_ns == made
    copy = tmp_path / "copy.txt"
    copy.write_bytes(output.read_bytes())
    (read,) = open_store(copy, TOKENIZER, 62).files
    assert np.array_equal(written.tokens, read.tokens)
    assert np.array_equal(written.offsets, read.offsets)
    assert written.fingerprint == read.fingerprint
    for name in ("lines", "num_tokens", "longest", "longest_line", "unknown", "text_sha256"):
        assert getattr(written.meta, name) == getattr(read.meta, name), name


def test_files_that_are_read_otherwise_than_before(tmp_path, monkeypatch):
    """An output of an earlier version, which read them as other text, is not up to date."""
    arguments = (GOLDEN / "input.txt", tmp_path / "train.txt", VOCABULARY)
    assert prepare(*arguments, workers=1).seconds is not None
    assert prepare(*arguments, workers=1).seconds is None
    monkeypatch.setattr(preparation, "READER", preparation.READER + 1)
    assert prepare(*arguments, workers=1).seconds is not None


@pytest.mark.parametrize("width", [1, 2, 62, 510, 4612, 5000])
def test_every_width(tmp_path, width):
    prepare(GOLDEN / "input.txt", tmp_path / "o", VOCABULARY, width + 2, workers=1, block_bytes=777)
    assert (tmp_path / "o").read_text() == prepare_plainly((GOLDEN / "input.txt").read_text(), width)
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
    assert (tmp_path / "o").read_text() == prepare_plainly(meaning, 6)


@pytest.mark.parametrize(("name", "pack"), [("text.gz", gzip.compress), ("text.xz", lzma.compress)])
def test_compressed_text(tmp_path, name, pack):
    packed = pack((GOLDEN / "input.txt").read_bytes())
    (tmp_path / name).write_bytes(packed)
    prepare(tmp_path / name, tmp_path / "o", VOCABULARY, 64, workers=1)
    assert (tmp_path / "o").read_bytes() == (GOLDEN / "expected_64.txt").read_bytes()
    (tmp_path / name).write_bytes(packed[:-100])
    with pytest.raises(DataError, match="is damaged, cut off"):
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
    expected = prepare_plainly((tmp_path / "i").read_text(encoding="utf-8-sig", errors="replace"), 62)
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


def test_long_lines_are_split_where_pieces_end(tmp_path):
    line = b" ".join([*(GOLDEN / "input.txt").read_bytes().split()] * 40)
    assert max(map(len, split_lines(line))) <= 64 << 10
    (tmp_path / "i").write_bytes(line)
    prepare(tmp_path / "i", tmp_path / "o", VOCABULARY, 64, workers=1)
    assert (tmp_path / "o").read_text() == prepare_plainly(line.decode(), 62)


MEASURED = """
import re, resource, sys
from DeBERTa import prepare_data
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


def start_and_wait_for_output(text: Path, output: Path) -> subprocess.Popen:
    arguments = build_command("-i", text, "-o", output, "--vocab_path", VOCABULARY, "--workers", "2")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        arguments,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # What runs tests in the background ignores Ctrl-C or SIGHUP, and its children would inherit that.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )
    partial = output.with_name(output.name + ".part")
    while not partial.exists() or partial.stat().st_size == 0:
        assert process.poll() is None, process.stderr.read()
    return process


def test_a_killed_run_leaves_nothing_and_is_finished_by_the_next(tmp_path):
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    workers = list_children(process.pid)
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


def test_killed_at_every_call_that_changes_a_file(tmp_path):
    """The output is absent or complete after each kill; the last run leaves nothing else."""
    output, expected = tmp_path / "train.txt", (GOLDEN / "expected_64.txt").read_bytes()
    arguments = build_command("-i", GOLDEN / "input.txt", "-o", output, "--vocab_path", VOCABULARY)
    arguments += ["--max_seq_length", "64", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "kill_at_call")}
    for number in itertools.count(1):
        run = subprocess.run(
            arguments, env=environment | {"KILL_AT_CALL": str(number)}, capture_output=True, check=False
        )
        assert not output.exists() or output.read_bytes() == expected
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
    assert number > 8
    assert find_store(output).meta.lines == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "train.txt.ids"]


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


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run(tmp_path, number, status):
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    os.killpg(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in errors
    assert errors.endswith("interrupted; run the same command again to finish\n")
    assert not output.parent.exists()


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_an_input_that_is_cut_off_while_it_is_read(tmp_path, packed):
    """Compressed, between two members: what is left is a valid file."""
    text, output, member = tmp_path / "i", tmp_path / "out" / "train.txt", packed(sample_megabytes(10))
    text.write_bytes(2 * member)
    process = start_and_wait_for_output(text, output)
    os.truncate(text, len(member))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    change = f"from {2 * len(member):,} to {len(member):,} bytes"
    assert errors.splitlines()[-1].partition("error: ")[2] == (
        f"{text} was cut off while it was read, {change}; prepare it when it is complete"
    )
    assert not output.parent.exists()


@pytest.mark.parametrize("while_sending", [False, True])
def test_a_worker_that_dies(tmp_path, while_sending):
    """Also in the middle of sending a result."""
    text, output = tmp_path / "i", tmp_path / "out" / "train.txt"
    text.write_bytes(sample_megabytes(20))
    process = start_and_wait_for_output(text, output)
    if while_sending:  # the main process receives nothing, so that results fill the pipe
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
    for child in list_children(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():  # not the tracker of semaphores
            os.kill(child, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in errors
    assert "Traceback" not in errors
    assert not output.parent.exists()


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


def write_inputs(folder: Path) -> list[Path]:
    """Write 600 documents as text, JSON lines and compressed text."""
    lines = [line for line in (GOLDEN / "input.txt").read_text().split("\n") if line.strip()]
    documents = [f"Number {number}. {lines[number % len(lines)][:200].strip()}" for number in range(600)]
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("\n".join(documents[:200]))
    (folder / "b.txt").write_bytes(gzip.compress("\n\n".join(documents[200:400]).encode()))
    records = "".join(json.dumps({"text": document}) + "\n" for document in documents[400:])
    (folder / "c.jsonl").write_text(records)
    return sorted(folder.iterdir())


def read_pieces(*texts: Path) -> list[str]:
    return [piece for text in texts for piece in text.read_text().split()]


@pytest.mark.parametrize("ranges", [(), ((0.0, 0.1), (0.95, 1.0))])
def test_several_inputs_give_the_same_bytes_for_any_number_of_workers(tmp_path, ranges):
    sources = write_inputs(tmp_path / "in")
    hashes = set()
    for workers, block_bytes in ((1, 1 << 20), (2, 2000), (3, 5000)):
        outputs = [
            tmp_path / f"{name}-{workers}.txt" for name in ("train", "valid", "test")[: 1 + len(ranges)]
        ]
        reading = Reading(has_documents=bool(ranges), block_bytes=block_bytes)
        results = prepare_outputs(sources, outputs, Recipe(VOCABULARY, reading, ranges), 64, workers)
        hashes.add(tuple(hashlib.sha256(output.read_bytes()).hexdigest() for output in outputs))
        assert [result.meta.lines for result in results] == [
            len(open_store(output, TOKENIZER, 62)) for output in outputs
        ]
    assert len(hashes) == 1
    if not ranges:
        texts = []
        for source in sources:
            prepare(source, tmp_path / source.name, VOCABULARY, 64, workers=1)
            texts.append(tmp_path / source.name)
        assert read_pieces(outputs[0]) == read_pieces(*texts)


def test_documents_stay_in_their_split(tmp_path):
    """With more input, in another order and format, and with other fractions for the other splits."""
    sources = write_inputs(tmp_path / "in")

    def split(sources: list[Path], valid: float, test: float) -> list[set[str]]:
        outputs = [tmp_path / f"{name}.txt" for name in ("train", "valid", "test")]
        recipe = Recipe(VOCABULARY, Reading(has_documents=True), ((0.0, valid), (1 - test, 1.0)))
        prepare_outputs(sources, outputs, recipe, 64, 1)
        texts = ["".join(read_pieces(output)).replace("▁", " ") for output in outputs]
        return [set(re.findall(r"Number (\d+)\.", text)) for text in texts]

    train, valid, test = split(sources, 0.1, 0.05)
    assert len(train) + len(valid) + len(test) == 600
    assert 30 < len(valid) < 90
    assert 10 < len(test) < 60
    fewer = split([sources[2], sources[0]], 0.1, 0.05)
    assert all(some < every for some, every in zip(fewer, (train, valid, test), strict=True))
    more = split(sources, 0.1, 0.2)
    assert more[1] == valid
    assert more[2] > test
    records = [json.dumps({"text": line}) for line in sources[0].read_text().split("\n")]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(reversed(records)))
    assert split([tmp_path / "in" / "a.jsonl"], 0.1, 0.05) == split([sources[0]], 0.1, 0.05)
    with pytest.raises(DataError, match=r"no document of .* is for valid\.txt"):
        split(sources, 0.0, 0.05)


def run_on_small_disk(kilobytes: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run the command in the folder /mnt of its own, a disk of this size.

    It fails where the system forbids to mount in a namespace of its own.
    """
    script = (
        f"mount -t tmpfs -o size={kilobytes}k tmpfs /mnt && cd /mnt && "
        f"{' '.join(build_command(*arguments))}; status=$?; ls -A /mnt; exit $status"
    )
    unshare = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    run = subprocess.run(unshare, capture_output=True, text=True, check=False)
    assert "unshare:" not in run.stderr, f"not permitted: {run.stderr}"
    assert "mount:" not in run.stderr, f"not permitted: {run.stderr}"
    return run


def test_full_disks_of_many_sizes(tmp_path):
    """One sentence with file and space, and nothing left; or the complete output."""
    text = tmp_path / "i"
    text.write_bytes((GOLDEN / "input.txt").read_bytes() * 8)  # 230 kB of pieces, 150 kB of ids
    arguments = ("-i", text, "-o", "train.txt", "--vocab_path", VOCABULARY, "--workers", 1)
    statuses = []
    for kilobytes in (20, 100, 200, 240, 260, 340, 380, 420, 480):
        run = run_on_small_disk(kilobytes, *arguments)
        statuses.append(run.returncode)
        if run.returncode:
            message = run.stderr.splitlines()[-1]
            assert re.search(
                r"error: cannot write /mnt/train\.txt(\.ids)?: No space left on device \([\d.]+ MB", message
            )
            assert run.stdout.split() in ([], ["train.txt"])
        else:
            assert run.stdout.split() == ["train.txt", "train.txt.ids"]
    assert statuses[0] == 1
    assert statuses[-1] == 0


def test_without_file_locks_the_first_output_remains(tmp_path, monkeypatch):
    """Two nodes prepare the same text on a file system without locks: readers have the first one mapped."""

    def fail(*_):
        raise OSError(errno.ENOSYS, "no locks")

    source, output = tmp_path / "raw.txt", tmp_path / "train.txt"
    source.write_text("A few words of text.\n" * 50)
    monkeypatch.setattr("fcntl.flock", fail)
    encode, first = preparation.encode_blocks, []

    def encode_while_another_finishes(*arguments):
        yield from encode(*arguments)
        monkeypatch.setattr(preparation, "encode_blocks", encode)
        prepare(source, output, VOCABULARY, 64, workers=1)
        first.extend(path.stat() for path in (output, get_store_path(output)))

    monkeypatch.setattr(preparation, "encode_blocks", encode_while_another_finishes)
    assert prepare(source, output, VOCABULARY, 64, workers=1).meta.lines
    now = [path.stat() for path in (output, get_store_path(output))]
    assert [(s.st_ino, s.st_mtime_ns) for s in now] == [(s.st_ino, s.st_mtime_ns) for s in first]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.txt", "train.txt", "train.txt.ids"]
