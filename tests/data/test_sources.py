"""Raw text as people have it: formats, compression, directories, patterns, damage."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from DeBERTa.data.sources import Reading, SourceFile, find_sources, sample_lines
from DeBERTa.data.text import LINES, PARAGRAPHS, STRINGS, read_documents
from DeBERTa.errors import DataError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "prepare"
TEXT = (GOLDEN / "input.txt").read_text()
DOCUMENTS = [line[:300].strip() for line in TEXT.split("\n") if line[:300].strip()]  # shorter than a block
COMPRESSIONS = {
    "gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress, "plain": bytes,
    "lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE),
}  # fmt: skip


def compress_zstandard(data: bytes) -> bytes:
    """In two frames, as parallel compressors write."""
    pyarrow = pytest.importorskip("pyarrow", reason="Zstandard is not tested: pyarrow is missing")
    half = len(data) // 2
    parts = (pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))
    return b"".join(parts)


def write_parquet(documents: list[str | None], **options) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is not tested: pyarrow is missing")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    parquet.write_table(table, file, **options)
    return file.getvalue()


def read(path: Path, **options) -> list[str]:
    """Return the documents of a file."""
    reading = Reading(**{"has_documents": True, "block_bytes": 1000} | options)
    blocks = SourceFile(path).read_blocks(reading)
    documents = [text for block in blocks for text in read_documents(block, reading.column, reading.errors)]
    return [document.decode().strip() for document in documents if document.strip()]


def test_blocks_hold_all_text_and_end_well(tmp_path):
    content = (
        "Zeile mit Straße\r\n" * 50 + "漢字" * 400 + "\r" + "wort " * 500 + "x" * 900 + "\n\nend"
    ).encode()
    (tmp_path / "i").write_bytes(content)
    for block_bytes in (7, 64, 1000, len(content), len(content) + 1):
        for has_documents in (False, True):
            reading = Reading(block_bytes=block_bytes, has_documents=has_documents)
            blocks = list(SourceFile(tmp_path / "i").read_blocks(reading))
            parts = [block.data for block in blocks]
            assert b"".join(parts) == content
            assert all(0 < len(data) <= block_bytes for data in parts)
            assert [block.offset for block in blocks] == [
                sum(map(len, parts[:index])) for index in range(len(parts))
            ]
            for data in parts:
                data.decode()


def test_vocabularies_of_large_texts_see_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("DeBERTa.data.sources.SAMPLE_BYTES", 2 << 20)
    text = b"".join(b"%07d.\n" % number for number in range(1_000_000))
    for name, content in (("i", text), ("i.gz", gzip.compress(text, 1))):
        (tmp_path / name).write_bytes(content)
        lines = sample_lines([tmp_path / name], Reading(block_bytes=64 << 10))
        numbers = [int(line[:7]) for line in lines]
        assert 1e6 < 9 * len(numbers) <= 2 << 20  # at least half of what is allowed
        assert min(numbers) < 200_000
        assert max(numbers) > 900_000
        assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "zstd"])
@pytest.mark.parametrize("form", ["text", "JSON lines", "Parquet"])
def test_formats_and_compressions_by_content(tmp_path, compression, form):
    """Under a name that says nothing, and under one that says something else."""
    contents = {
        "text": lambda: "\n".join(DOCUMENTS).encode(),
        "JSON lines": lambda: "".join(json.dumps({"id": 7, "text": d}) + "\n" for d in DOCUMENTS).encode(),
        "Parquet": lambda: write_parquet(DOCUMENTS, row_group_size=10),
    }
    pack = compress_zstandard if compression == "zstd" else COMPRESSIONS[compression]
    packed = pack(contents[form]())
    for name in ("data", "data.xz", "data.txt"):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path / name) == DOCUMENTS
    (tmp_path / "empty").write_bytes(pack(b""))
    assert read(tmp_path / "empty") == []
    if compression != "plain":
        (tmp_path / "damaged").write_bytes(packed[: len(packed) * 2 // 3])
        with pytest.raises(DataError, match=r"damaged is damaged, cut off, or not \w+ data to its end"):
            read(tmp_path / "damaged")


def test_parquet_columns_of_repeated_text(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is not tested: pyarrow is missing")
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(["one", "two", "one", None]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "i")
    assert read(tmp_path / "i") == ["one", "two", "one"]


def test_bad_bytes_in_a_parquet_column(tmp_path):
    """As the strings of a column, and as those of a dictionary of repeated text."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is not tested: pyarrow is missing")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"fine"] * 70 + [None, b"na\xefve"])
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    for number, kind in enumerate((column, column.dictionary_encode())):
        path = tmp_path / str(number)
        parquet.write_table(pyarrow.table({"text": kind}), path)
        with pytest.raises(DataError, match=rf"{path}, row 72, is not .* at byte 2: .*--errors replace"):
            read(path)
        assert read(path, errors="replace")[-1] == "na\ufffdve"


def test_bad_bytes_in_the_name_of_a_parquet_column(tmp_path):
    content = write_parquet(DOCUMENTS[:9], store_schema=False)
    (tmp_path / "i").write_bytes(content.replace(b"\x18\x04text", b"\x18\x04te\xfft"))
    with pytest.raises(DataError, match=r"not a complete Parquet file: .*; copy it again"):
        read(tmp_path / "i")


FORMS: dict[str, Callable[[], bytes]] = {
    "text": lambda: "\n".join(DOCUMENTS).encode(),
    "JSON lines": lambda: "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:50]).encode(),
    "Parquet": lambda: write_parquet(DOCUMENTS[:50], store_schema=False, row_group_size=20),
    "uncompressed Parquet": lambda: write_parquet(DOCUMENTS[:50], store_schema=False, compression="none"),
}


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "zstd"])
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_read_or_one_sentence(tmp_path, compression, form):
    """A bit, some bytes, zeros, a missing end; with and without `--errors replace`."""
    pack = compress_zstandard if compression == "zstd" else COMPRESSIONS[compression]
    intact, path = pack(FORMS[form]()), tmp_path / "damaged"
    messages = []
    for seed in range(30):
        generator, damaged = random.Random(seed), bytearray(intact)
        place = generator.randrange(len(damaged))
        if seed % 4 == 0:
            damaged[place] ^= 1 << generator.randrange(8)
        elif seed % 4 == 3:
            del damaged[place:]
        else:
            size = generator.randrange(1, 9)
            damaged[place : place + size] = bytes(size) if seed % 4 == 1 else generator.randbytes(size)
        path.write_bytes(damaged)
        try:
            assert all(read(path, errors="replace" if generator.random() < 0.5 else "strict"))
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all(str(path) in text and "; " in text and "\n" not in text for text in messages), messages


def test_a_parquet_file_without_the_column(tmp_path):
    (tmp_path / "i").write_bytes(write_parquet(["a"]))
    with pytest.raises(DataError, match=r"\(columns: id \(int64\), text \(string\)\); pass --column"):
        read(tmp_path / "i", column="body")


def make_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(GOLDEN / "input.txt", "input.txt")
    return file.getvalue()


def make_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("input.txt", TEXT)
    return file.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        make_zip,
        make_tar,
        lambda: random.Random(0).randbytes(5000),
        lambda: b"some words, then\n" + random.Random(0).randbytes(5000),
        lambda: (GOLDEN / "spm.model").read_bytes(),
        lambda: "Русский текст в старой кодировке\n".encode("cp1251") * 50,
        lambda: gzip.compress(gzip.compress(TEXT.encode())),
        lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    ],
)
def test_binary_data_is_never_to_be_replaced(tmp_path, make: Callable[[], bytes]):
    (tmp_path / "i").write_bytes(make())
    with pytest.raises(DataError) as error:
        read(tmp_path / "i")
    assert "--errors" not in str(error.value)
    assert "iconv" in str(error.value) or "extract" in str(error.value)


def test_a_few_bad_bytes_may_be_replaced(tmp_path):
    (tmp_path / "i").write_bytes(TEXT.encode() + b"\nna\xefve\n")
    with pytest.raises(DataError, match=r"at byte \d+: .*--errors replace"):
        read(tmp_path / "i")
    assert read(tmp_path / "i", errors="replace")[-1].endswith("\nna\ufffdve")


def test_directories_and_patterns_are_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.txt",
        "b/10.txt",
        "b/.hidden",
        "b/_SUCCESS",
        "b/c/.d/x",
        "b/c/3.txt",
        "a.txt",
        "x.jsonl",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    found = find_sources([Path("x.jsonl"), Path("b"), Path("*.txt"), Path("**/3.txt"), Path("-")])
    assert list(map(str, found)) == ["x.jsonl", "b/10.txt", "b/2.txt", "b/c/3.txt", "a.txt", "b/c/3.txt", "-"]
    Path("b[1]").mkdir()
    Path("b[1]/y").touch()
    assert find_sources([Path("b[1]")]) == [Path("b[1]/y")]
    Path("empty").mkdir()
    for missing in ("empty", "nothing", "*.gz"):
        with pytest.raises(DataError, match="no text file"):
            find_sources([Path(missing)])
    with pytest.raises(DataError, match="standard input twice"):
        find_sources([Path("-"), Path("-")])


def test_patterns_name_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s/x/y").mkdir(parents=True)
    for name in ("s/x/y/a.txt", "s/x/b.txt"):
        Path(name).write_text(name)
    for pattern in ("s/**", "s/**/*", "s/**/*.txt", "s"):
        assert sorted(map(str, find_sources([Path(pattern)]))) == ["s/x/b.txt", "s/x/y/a.txt"]
    for given in ("s", "s/**"):
        assert find_sources([Path(given)], lambda path: path.name == "b.txt") == [Path("s/x/y/a.txt")]
    with pytest.raises(DataError, match=r"no text file s: all files there are outputs of this command"):
        find_sources([Path("s")], lambda _: True)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_links_name_each_file_once(tmp_path, monkeypatch, is_reversed):
    """By the same of its names, whichever the file system lists first."""
    monkeypatch.chdir(tmp_path)
    Path("s/2024").mkdir(parents=True)
    Path("s/2024/x.txt").write_text("x")
    for link, target in (("again", "2024"), ("latest", "2024"), ("y.txt", "2024/x.txt")):
        (Path("s") / link).symlink_to(target)
    walk = os.walk

    def walk_in_order(*arguments, **options):
        for folder, folders, names in walk(*arguments, **options):
            folders.sort(reverse=is_reversed)
            yield folder, folders, names

    monkeypatch.setattr(os, "walk", walk_in_order)
    for given in ("s", "s/*", "s/**"):
        assert find_sources([Path(given)]) == [Path("s/2024/x.txt")], given


def test_links_below_a_directory(tmp_path):
    """They are followed, circles too; a file that is not there is an error, not silence."""
    for name in ("disk/part", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "disk" / "part" / "a.txt").write_text("a")
    (tmp_path / "data" / "part").symlink_to(tmp_path / "disk" / "part")
    (tmp_path / "disk" / "part" / "circle").symlink_to(tmp_path / "data")
    assert find_sources([tmp_path / "data"]) == [tmp_path / "data" / "part" / "a.txt"]
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data/gone: it is a link to nothing; remove it"):
        find_sources([tmp_path / "data"])


def test_a_directory_that_cannot_be_read(tmp_path):
    """It is an error: nothing below it is omitted."""
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "closed").chmod(0)
    (tmp_path / "data").chmod(0o755)
    code = "import os, sys; from pathlib import Path; from DeBERTa.data.sources import find_sources\n"
    code += "if os.getuid() == 0: os.setuid(65534)\nprint(find_sources([Path(sys.argv[1])]))"
    folders = [tmp_path, *tmp_path.parents[:-1]]
    modes = {folder: folder.stat().st_mode for folder in folders}
    try:
        for folder, mode in modes.items():
            folder.chmod(mode | 0o111)
        command = [sys.executable, "-c", code, str(tmp_path / "data")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
        (tmp_path / "data" / "closed").chmod(0o755)
    assert "closed: Permission denied; check its permissions" in done.stderr, done.stdout


def test_without_pyarrow_one_sentence_says_what_is_missing(tmp_path):
    (tmp_path / "i").write_bytes(b"PAR1" + bytes(100))
    code = (
        "import sys; sys.modules['pyarrow'] = None; from DeBERTa import prepare_data;"
        "sys.exit(prepare_data.main(sys.argv[1:]))"
    )
    arguments = ["-i", tmp_path / "i", "-o", tmp_path / "o", "--vocab_path", GOLDEN / "spm.model"]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Parquet needs the package pyarrow; install it with pip install pyarrow" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("block_bytes", [1000, 64 << 10, 1 << 20])
def test_documents_do_not_depend_on_the_size_of_blocks(tmp_path, block_bytes):
    """The first blank line of the first megabyte decides, also when smaller blocks are sampled."""
    (tmp_path / "i").write_text("a line\n" * 20_000 + "\n" + "a line\n" * 100_000)
    first, *_ = SourceFile(tmp_path / "i").read_blocks(Reading(has_documents=True, block_bytes=block_bytes))
    assert first.kind == PARAGRAPHS
    (tmp_path / "i").write_text("a line\n" * 160_000 + "\na line\n")
    first, *_ = SourceFile(tmp_path / "i").read_blocks(Reading(has_documents=True, block_bytes=block_bytes))
    assert first.kind == LINES


def test_blocks_of_parquet_are_small(tmp_path):
    (tmp_path / "i").write_bytes(write_parquet(DOCUMENTS * 100))
    blocks = list(SourceFile(tmp_path / "i").read_blocks(Reading(block_bytes=10_000)))
    assert len(blocks) > 5
    assert all(block.kind == STRINGS and block.count_bytes() < 30_000 for block in blocks)
