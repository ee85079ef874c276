"""Token stores: the ids of the text, rebuilt when it changed, never incomplete."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from DeBERTa.data.prepare import prepare
from DeBERTa.data.token_store import TokenStore, find_store, get_store_path, open_store
from DeBERTa.data.tokenizer import Tokenizer, train_vocabulary
from DeBERTa.errors import DataError, VocabularyError
from DeBERTa.log import set_up_logging

GOLDEN = Path(__file__).parents[1] / "golden" / "prepare"
TOKENIZER = Tokenizer(GOLDEN / "spm.model")


@pytest.fixture
def text(tmp_path) -> Path:
    return Path(shutil.copy(GOLDEN / "expected_64.txt", tmp_path / "train.txt"))


def pieces(store: TokenStore) -> list[str]:
    return [" ".join(TOKENIZER.pieces[index] for index in store[line]) for line in range(len(store))]


def test_lines_are_those_of_the_text(text):
    store = open_store(text, TOKENIZER, 62)
    assert pieces(store) == text.read_text().splitlines()
    assert store.meta.lines == len(store) == len(store.offsets) - 1
    pieces_of_text = sum(len(line.split(" ")) for line in text.read_text().splitlines())
    assert store.meta.num_tokens == len(store.tokens) == pieces_of_text
    assert (store.meta.longest, store.meta.longest_line, store.meta.unknown) == (62, 1, 0)
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == store[0].dtype == np.int32
    assert store.offsets.dtype == np.int64


def test_a_valid_store_is_not_rebuilt(text):
    open_store(text, TOKENIZER, 62)
    before = get_store_path(text).stat().st_mtime_ns
    open_store(text, TOKENIZER, 62)
    assert get_store_path(text).stat().st_mtime_ns == before
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_rebuilt_when_the_text_changed(text):
    open_store(text, TOKENIZER, 62)
    text.write_text("▁the ▁of\n")
    assert pieces(open_store(text, TOKENIZER, 62)) == ["▁the ▁of"]
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_rebuilt_for_another_vocabulary(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("▁the ▁of ▁and\n")
    open_store(text, TOKENIZER, 62)
    train_vocabulary((GOLDEN / "input.txt").read_text().splitlines(), 300, tmp_path / "other.model")
    other = Tokenizer(tmp_path / "other.model")
    store = open_store(text, other, 62)
    assert [other.pieces[index] for index in store[0]] == ["▁the", "▁of", "▁and"]


def test_text_prepared_with_another_vocabulary_is_refused(tmp_path):
    prepare(GOLDEN / "input.txt", tmp_path / "train.txt", GOLDEN / "spm.model", 64, workers=1)
    train_vocabulary((GOLDEN / "input.txt").read_text().splitlines(), 300, tmp_path / "other.model")
    with pytest.raises(VocabularyError, match=r"vocabulary .*other\.model: .*spm\.model; .*--vocab_path"):
        open_store(tmp_path / "train.txt", Tokenizer(tmp_path / "other.model"), 62)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999, 1.0001])
def test_a_damaged_store_is_rebuilt(text, share):
    open_store(text, TOKENIZER, 62)
    path = get_store_path(text)
    os.truncate(path, int(share * path.stat().st_size))
    assert find_store(text) is None
    assert pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()


def test_line_ends_blank_lines_and_double_spaces(text):
    text.write_bytes("▁the ▁of\r\n\n  \n▁and\n▁the  ▁in \n ▁to".encode())
    assert pieces(open_store(text, TOKENIZER, 62)) == ["▁the ▁of", "▁and", "▁the ▁in", "▁to"]


def test_a_few_unknown_pieces_are_a_warning(text, capsys):
    set_up_logging()
    text.write_text("▁the ▁of ▁and ▁in\n" * 100 + "▁qqqq [UNK] [UNK]\n")
    store = open_store(text, TOKENIZER, 62)
    assert store.meta.unknown == 1
    assert store[100].tolist() == [TOKENIZER.unk_id] * 3
    assert "1 of 403 pieces" in capsys.readouterr().err
    open_store(text, TOKENIZER, 62, progress=False)
    assert capsys.readouterr().err == ""


def test_text_of_another_vocabulary_is_refused(text):
    text.write_text("▁the ▁qa ▁qb ▁qc ▁qd\n")
    with pytest.raises(
        VocabularyError, match=r"train\.txt.*spm\.model: 80\.00% .*▁qa, ▁qb, ▁qc;.*--vocab_path"
    ):
        open_store(text, TOKENIZER, 62)
    assert not get_store_path(text).exists()


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
    assert [path.name for path in text.parent.iterdir()] == ["train.txt"]


def test_missing_text(tmp_path):
    with pytest.raises(DataError, match=r"valid\.txt: .*prepare_data\.py"):
        open_store(tmp_path / "valid.txt", TOKENIZER, 62)


def test_the_cache_directory_is_used_if_nothing_can_be_written_next_to_the_text(text, tmp_path, monkeypatch):
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    # A store of this name would exceed the 255 bytes of a file name, so that no user can write it.
    long_name = text.rename(text.with_name("x" * 251 + ".txt"))
    for _ in range(2):
        assert pieces(open_store(long_name, TOKENIZER, 62)) == long_name.read_text().splitlines()
    assert find_store(long_name).path.parent == tmp_path / "cache" / "token-stores"


def _sum_of_ids(text: Path, barrier, results) -> None:
    tokenizer = Tokenizer(GOLDEN / "spm.model")
    barrier.wait()
    results.put(int(open_store(text, tokenizer, 62, progress=False).tokens.sum()))


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
    assert sums == {int(open_store(text, TOKENIZER, 62).tokens.sum())}
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_remains_of_a_killed_build_are_overwritten(text):
    text.with_name("train.txt.ids.part").write_bytes(b"incomplete")
    assert pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert sorted(path.name for path in text.parent.iterdir()) == ["train.txt", "train.txt.ids"]


def test_the_directory_of_format_1_is_replaced(text):
    get_store_path(text).mkdir()
    (get_store_path(text) / "meta.json").write_text("{}")
    assert pieces(open_store(text, TOKENIZER, 62)) == text.read_text().splitlines()
    assert get_store_path(text).is_file()
