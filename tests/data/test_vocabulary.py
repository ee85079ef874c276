"""Training of vocabularies on files: what is recorded, reported and never overwritten."""

from pathlib import Path

import pytest

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.data.vocabulary import find_or_train_vocabulary
from DeBERTa.errors import VocabularyError
from DeBERTa.log import set_up_logging

TEXT = (Path(__file__).parents[1] / "golden" / "prepare" / "input.txt").read_text()


def test_missing_characters_are_named(tmp_path, capsys):
    set_up_logging()
    (tmp_path / "i").write_text(TEXT + "".join(map(chr, range(0x4E00, 0x4E1A))))
    find_or_train_vocabulary([tmp_path / "i"], 400, tmp_path / "all.model")
    assert "warning" not in capsys.readouterr().err
    find_or_train_vocabulary([tmp_path / "i"], 400, tmp_path / "most.model", character_coverage=0.998)
    errors = capsys.readouterr().err
    assert "missing from the vocabulary become [UNK]: " in errors
    assert " 一 (U+4E00) 丁 (U+4E01) " in errors
    assert errors.endswith(" and 15 more\n")
    with pytest.raises(VocabularyError, match=r"400 pieces and character coverage 1\.0 on"):
        find_or_train_vocabulary([tmp_path / "i"], 400, tmp_path / "most.model")


def test_a_vocabulary_of_characters_is_reported(tmp_path, capsys):
    set_up_logging()
    (tmp_path / "i").write_text(TEXT + "".join(map(chr, range(0x4E00, 0x4F00))))
    find_or_train_vocabulary([tmp_path / "i"], 700, tmp_path / "m")
    assert "pieces of" in capsys.readouterr().err
    assert len(Tokenizer(tmp_path / "m")) == 701
    with pytest.raises(VocabularyError, match=r"take \d{3}; .*--character_coverage"):
        find_or_train_vocabulary([tmp_path / "i"], 200, tmp_path / "n")
    for size in (-3, 0):
        with pytest.raises(VocabularyError, match=f"of {size} pieces: it is too small"):
            find_or_train_vocabulary([tmp_path / "i"], size, tmp_path / "n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "m", "m.json"]
