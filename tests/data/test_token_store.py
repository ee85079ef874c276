"""Token stores: the ids of the text, rebuilt when it changed, never incomplete."""

import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from DeBERTa.data.token_store import (
    TRAILER_BYTES,
    TokenStore,
    find_store,
    get_part_name,
    get_store_path,
    open_store,
)
from DeBERTa.data.tokenizer import Tokenizer, train_vocabulary
from DeBERTa.errors import DamagedStoreError, DataError, StorageError, VocabularyError
from DeBERTa.log import set_up_logging
from tests.data.texts import prepare

GOLDEN = Path(__file__).parents[1] / "golden" / "prepare"
TOKENIZER = Tokenizer(GOLDEN / "spm.model")


@pytest.fixture
def text(tmp_path) -> Path:
    return Path(shutil.copy(GOLDEN / "expected_64.txt", tmp_path / "train.txt"))


def list_pieces(store: TokenStore) -> list[str]:
    return [" ".join(TOKENIZER.pieces[index] for index in store[line]) for line in range(len(store))]


def test_lines_are_those_of_the_text(text):
    store = open_store(text, TOKENIZER, 62)
    assert list_pieces(store) == text.read_text().splitlines()
    (file,) = store.files
    assert store.meta.lines == len(store) == len(file.offsets) - 1
    pieces_of_text = sum(len(line.split(" ")) for line in text.read_text().splitlines())
    assert store.meta.num_tokens == len(file.tokens) == pieces_of_text
    assert (store.meta.longest, store.meta.longest_line, store.meta.unknown) == (62, 1, 0)
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == store[0].dtype == np.int32
    assert file.offsets.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "what"), [(gzip.compress, "is gzip data, not text"), (lzma.compress, "is xz data, not text")]
)
def test_text_that_was_compressed_later(text, change, what):
    text.write_bytes(change(text.read_bytes()))
    with pytest.raises(DataError, match=f"train.txt {what}; extract the text"):
        open_store(text, TOKENIZER, 62)


def test_a_valid_store_is_not_rebuilt(text):
    open_store(text, TOKENIZER, 62)
    before = get_store_path(text).stat().st_mtime_ns
    open_store(text, TOKENIZER, 62)
    assert get_store_path(text).stat().st_mtime_ns == before
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_rebuilt_when_the_text_changed(text):
    open_store(text, TOKENIZER, 62)
    text.write_text("▁the ▁of\n")
    assert list_pieces(open_store(text, TOKENIZER, 62)) == ["▁the ▁of"]
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_rebuilt_for_another_vocabulary(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("▁the ▁of ▁and\n")
    open_store(text, TOKENIZER, 62)
    (tmp_path / "other.model").write_bytes(
        train_vocabulary((GOLDEN / "input.txt").read_text().splitlines(), 300)
    )
    other = Tokenizer(tmp_path / "other.model")
    store = open_store(text, other, 62)
    assert [other.pieces[index] for index in store[0]] == ["▁the", "▁of", "▁and"]


def test_text_prepared_with_another_vocabulary_is_refused(tmp_path):
    prepare(GOLDEN / "input.txt", tmp_path / "train.txt", GOLDEN / "spm.model", 64, workers=1)
    (tmp_path / "other.model").write_bytes(
        train_vocabulary((GOLDEN / "input.txt").read_text().splitlines(), 300)
    )
    with pytest.raises(VocabularyError, match=r"vocabulary .*other\.model: .*spm\.model; .*--vocab_path"):
        open_store(tmp_path / "train.txt", Tokenizer(tmp_path / "other.model"), 62)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999, 1.0001])
def test_a_damaged_store_is_rebuilt(text, share):
    open_store(text, TOKENIZER, 62)
    path = get_store_path(text)
    os.truncate(path, int(share * path.stat().st_size))
    assert find_store(text) is None
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()


def test_a_store_with_deeply_nested_metadata_is_rebuilt(text):
    metadata = b"[" * 99_999
    content = bytes(8) + metadata + bytes(TRAILER_BYTES - 8) + len(metadata).to_bytes(8, "little")
    get_store_path(text).write_bytes(content)
    assert find_store(text) is None


def test_line_ends_blank_lines_and_double_spaces(text):
    text.write_bytes("▁the ▁of\r\n\n  \n▁and\n▁the  ▁in \n ▁to".encode())
    assert list_pieces(open_store(text, TOKENIZER, 62)) == ["▁the ▁of", "▁and", "▁the ▁in", "▁to"]


def test_a_few_unknown_pieces_are_a_warning(text, capsys):
    set_up_logging()
    text.write_text("▁the ▁of ▁and ▁in\n" * 100 + "▁qqqq [UNK] [UNK]\n")
    store = open_store(text, TOKENIZER, 62)
    assert store.meta.unknown == 1
    assert store[100].tolist() == [TOKENIZER.unk_id] * 3
    assert "1 of 403 pieces" in capsys.readouterr().err
    open_store(text, TOKENIZER, 62, has_progress=False)
    assert capsys.readouterr().err == ""


def test_text_of_another_vocabulary_is_refused(text):
    text.write_text("▁the ▁qa ▁qb ▁qc ▁qd\n")
    with pytest.raises(
        VocabularyError, match=r"train\.txt.*spm\.model: 80\.00% .*▁qa, ▁qb, ▁qc;.*--vocab_path"
    ):
        open_store(text, TOKENIZER, 62)
    assert not get_store_path(text).exists()


def test_padding_is_no_text(text, capsys):
    set_up_logging()
    text.write_text("▁the ▁of ▁and ▁in\n" * 100 + "▁the [PAD]\n")
    store = open_store(text, TOKENIZER, 62)
    assert store[100].tolist() == [TOKENIZER.piece_to_id["▁the"], TOKENIZER.unk_id]
    assert "1 of 402 pieces" in capsys.readouterr().err


def test_written_unknown_pieces_are_not_unknown(text):
    text.write_text("[UNK] [UNK] ▁the\n")
    assert open_store(text, TOKENIZER, 62).meta.unknown == 0


def test_a_line_that_is_too_long(text):
    text.write_text("▁the\n\n" + "▁the " * 10 + "\n▁of\n")
    for _ in range(2):  # when it is built, and from the cache
        with pytest.raises(
            DataError, match=r"train\.txt, line 3: 10 tokens, .*--max_seq_length 11 allows 9 "
        ):
            open_store(text, TOKENIZER, 9)
    assert open_store(text, TOKENIZER, 10).meta.longest == 10


def test_a_line_without_end_is_refused(text, monkeypatch):
    monkeypatch.setattr("DeBERTa.data.token_store.MAX_LINE_BYTES", 5000)
    text.write_text("▁the " * 10_000)
    with pytest.raises(DataError, match="not prepared text"):
        open_store(text, TOKENIZER, 62)


@pytest.mark.parametrize("content", ["", "\n", " \r\n\n"])
def test_text_without_lines(text, content):
    text.write_text(content)
    with pytest.raises(DataError, match="no lines"):
        open_store(text, TOKENIZER, 62)


def test_a_pipe_in_place_of_a_text(text):
    text.unlink()
    os.mkfifo(text)
    with pytest.raises(DataError, match=r"train\.txt: it is neither a file nor a directory of parts"):
        open_store(text, TOKENIZER, 62)


def test_missing_text(tmp_path):
    with pytest.raises(DataError, match=r"valid\.txt: .*prepare_data\.py"):
        open_store(tmp_path / "valid.txt", TOKENIZER, 62)


def test_the_cache_directory_is_used_if_nothing_can_be_written_next_to_the_text(text, tmp_path, monkeypatch):
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    # A store of this name would exceed the 255 bytes of a file name, so that no user can write it.
    long_name = text.rename(text.with_name("x" * 251 + ".txt"))
    for _ in range(2):
        assert list_pieces(open_store(long_name, TOKENIZER, 62)) == long_name.read_text().splitlines()
    assert find_store(long_name).path.parent == tmp_path / "cache" / "token-stores"


def _sum_of_ids(text: Path, barrier, results) -> None:
    tokenizer = Tokenizer(GOLDEN / "spm.model")
    barrier.wait()
    results.put(int(open_store(text, tokenizer, 62, has_progress=False).files[0].tokens.sum()))


def test_processes_that_build_at_once(text):
    text.write_bytes((GOLDEN / "expected_64.txt").read_bytes() * 50)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_sum_of_ids, args=(text, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {int(open_store(text, TOKENIZER, 62).files[0].tokens.sum())}
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_remains_of_a_killed_build_are_overwritten(text):
    text.with_name("train.txt.ids.part").write_bytes(b"incomplete")
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_the_directory_of_format_1_is_replaced(text):
    get_store_path(text).mkdir()
    (get_store_path(text) / "meta.json").write_text("{}")
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert get_store_path(text).is_file()


def test_other_directories_are_not_removed(text, tmp_path, monkeypatch):
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    for name in ("meta.json", "thesis.tex"):
        get_store_path(text).mkdir(exist_ok=True)
        (get_store_path(text) / name).write_text("{}")
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert len(list(get_store_path(text).iterdir())) == 2
    assert find_store(text).path.parent == tmp_path / "cache" / "token-stores"
    with pytest.raises(StorageError, match=r"ids: it is a directory with other files \(thesis\.tex\);"):
        prepare(GOLDEN / "input.txt", text, GOLDEN / "spm.model", 64, workers=1)


def test_a_pipe_in_place_of_a_store_is_replaced(text):
    os.mkfifo(get_store_path(text))
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert get_store_path(text).is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1}, {"format": "3"}, {"longest": "5"}, {"longest": 62.0}, {"lines": None}, {"unknown": -7},
        {"unknown": 10**9}, {"longest": 10**30}, {"longest_line": 10**9},
        {"unknown": True}, {"text_sha256": None}, {"recipe": []}, {"num_tokens": 10**30}, {"num_tokens": -1},
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_is_rebuilt(text, change):
    open_store(text, TOKENIZER, 62)
    path = get_store_path(text)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:], "little")
    arrays, metadata = content[: -TRAILER_BYTES - length], json.loads(content[-TRAILER_BYTES - length : -40])
    encoded = json.dumps(metadata | change).encode()
    hashed = arrays[-(-metadata["num_tokens"] // 2) * 8 :] + encoded
    trailer = hashlib.sha256(hashed).digest() + len(encoded).to_bytes(8, "little")
    path.write_bytes(arrays + encoded + trailer)
    assert find_store(text) is None
    open_store(text, TOKENIZER, 62)
    assert path.read_bytes() == content


def overwrite(path: Path, position: int, data: bytes) -> None:
    """Overwrite bytes of a file, which keeps its size; negative positions count from its end."""
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(data)] = data
    path.write_bytes(content)


def test_any_changed_byte_of_a_store_is_found_and_mended(text):
    """Ids, line ends, checksums, metadata and trailer: 60 places, each with several kinds of damage."""
    open_store(text, TOKENIZER, 62)
    path = get_store_path(text)
    intact, generator = path.read_bytes(), random.Random(0)
    places = [0, 4, -1, -9, -41, *(generator.randrange(len(intact)) for _ in range(55))]
    for place in places:
        damage = generator.choice([b"\0\0\0\0", b"\xff\xff\xff\x7f", (2000).to_bytes(4, "little"), b"1"])
        path.write_bytes(intact)
        overwrite(path, place, damage)
        if path.read_bytes() == intact:
            continue
        assert find_store(text) is None, (place, damage)
    assert list_pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert path.read_bytes()[:-200] == intact[:-200]  # the metadata has the time of the text


def test_ids_that_change_after_the_start_end_the_run(text, monkeypatch):
    """Blocks beyond those that are verified when the store is opened."""
    monkeypatch.setattr("DeBERTa.data.token_store.VERIFIED_AT_OPEN", 1)
    monkeypatch.setattr("DeBERTa.data.token_store.BLOCK_TOKENS", 500)
    store = open_store(text, TOKENIZER, 62)
    expected, path = list_pieces(store), get_store_path(text)
    store = open_store(text, TOKENIZER, 62)
    overwrite(path, 4 * 3000, b"\1\0\0\0")
    store = open_store(text, TOKENIZER, 62)
    assert store[0].tolist() == [TOKENIZER.piece_to_id[piece] for piece in expected[0].split(" ")]
    with pytest.raises(DamagedStoreError, match=r"train\.txt\.ids is damaged: .*builds it again") as error:
        list_pieces(store)
    assert error.value.is_retryable
    assert not path.exists()
    assert list_pieces(open_store(text, TOKENIZER, 62)) == expected


def test_parts_are_verified_at_open_like_one_text(text, tmp_path, monkeypatch):
    """The limit is that of all parts: one within it is built again, one past it fails when it is read."""
    monkeypatch.setattr("DeBERTa.data.token_store.BLOCK_TOKENS", 500)
    parts = tmp_path / "parts"
    parts.mkdir()
    paths = [parts / get_part_name(number, 3) for number in range(3)]
    for path in paths:
        shutil.copy(text, path)
    store = open_store(parts, TOKENIZER, 62)
    intact = get_store_path(paths[0]).read_bytes()
    monkeypatch.setattr(
        "DeBERTa.data.token_store.VERIFIED_AT_OPEN", -(-store.meta.num_tokens // 3 // 500) + 2
    )
    for path in paths[::2]:
        overwrite(get_store_path(path), 4 * 100, b"\1\0\0\0")
    store = open_store(parts, TOKENIZER, 62)
    assert get_store_path(paths[0]).read_bytes()[:-200] == intact[:-200]
    with pytest.raises(DamagedStoreError, match=rf"{paths[2].name}\.ids is damaged"):
        list_pieces(store)


@pytest.mark.parametrize("value", [-1, 0, 61, 10**6, 2**62])
def test_line_ends_that_change_during_a_run_end_it(text, value):
    store = open_store(text, TOKENIZER, 62)
    lines, path = len(store), get_store_path(text)
    offset = -(-store.meta.num_tokens // 2) * 8 + 8 * 20
    with path.open("r+b") as file:  # in place, while it is mapped
        file.seek(offset)
        file.write(value.to_bytes(8, "little", signed=True))
    with pytest.raises(DamagedStoreError, match="builds it again"):
        [store[line] for line in range(lines)]
    assert not path.exists()


def test_fingerprint_is_of_the_ids(text, tmp_path):
    """Other copies, dates and line ends have the same; other ids or line ends have not."""
    first = open_store(text, TOKENIZER, 62).fingerprint
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes().replace(b"\n", b"\r\n"))
    assert open_store(copy, TOKENIZER, 62).fingerprint == first
    copy.write_text(text.read_text().replace("▁the ", "▁of ", 1))
    assert open_store(copy, TOKENIZER, 62).fingerprint != first
    copy.write_text(text.read_text().replace("\n", " ", 1))
    assert open_store(copy, TOKENIZER, 124).fingerprint != first


def test_a_directory_of_parts_is_one_text(text):
    lines = text.read_text().splitlines(keepends=True)
    directory = text.with_name("parts.txt")
    directory.mkdir()
    for number, part in enumerate((lines[:20], [], lines[20:])):
        (directory / get_part_name(number, 3)).write_text("".join(part))
    store = open_store(directory, TOKENIZER, 62)
    assert list_pieces(store) == [line.strip() for line in lines]
    assert store.meta.lines == len(lines)
    assert store.meta.num_tokens == open_store(text, TOKENIZER, 62).meta.num_tokens
    before = (store.fingerprint, store.meta.text_sha256)
    for path in directory.glob("*.ids"):
        path.unlink()
    store = open_store(directory, TOKENIZER, 62)
    assert (store.fingerprint, store.meta.text_sha256) == before
    with pytest.raises(DataError, match=r"00000-of-00003\.txt, line 1: 62 tokens"):
        open_store(directory, TOKENIZER, 61)
    (directory / get_part_name(1, 3)).unlink()
    with pytest.raises(DataError, match=r"not complete: 00001-of-00003\.txt missing"):
        open_store(directory, TOKENIZER, 62)
    (directory / get_part_name(1, 4)).touch()
    with pytest.raises(DataError, match="not complete"):
        open_store(directory, TOKENIZER, 62)


def test_ids_are_counted(text):
    store = open_store(text, TOKENIZER, 62)
    words = text.read_text().split()
    counts = store.count_ids(2008)
    assert counts.shape == (2008,)
    assert all(counts[TOKENIZER.pieces.index(word)] == words.count(word) for word in set(words[:300]))
    assert counts.sum() == len(words)
    assert store.count_ids(2008, max_tokens=100)[TOKENIZER.pieces.index("▁the")] == words[:100].count("▁the")
