"""Vocabularies: the ids they must have, the kinds of pieces, and training one."""

import contextlib
import hashlib
import io
import random
import struct
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from DeBERTa.data.tokenizer import (
    CONTINUES_WORD,
    PUNCTUATION,
    SPECIAL,
    STARTS_WORD,
    Tokenizer,
    split_at_spaces,
    train_vocabulary,
)
from DeBERTa.errors import VocabularyError
from DeBERTa.hub.tokenizer_json import build_tokenizer_json

GOLDEN = Path(__file__).parents[1] / "golden" / "prepare"
TEXT = (GOLDEN / "input.txt").read_text().splitlines()
DEBERTA_IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
DEBERTA_NAMES = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}


def train_other_vocabulary(path: Path, **options) -> Path:
    """Train a vocabulary with SentencePiece alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=300, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def test_ids_of_the_golden_vocabulary():
    tokenizer = Tokenizer(GOLDEN / "spm.model")
    ids = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 2000)
    assert tokenizer.special_ids == set(ids)
    assert len(tokenizer) == len(tokenizer.pieces) == 2001
    assert tokenizer.pieces[2000] == "[MASK]"
    assert all(tokenizer.piece_to_id[piece] == index for index, piece in enumerate(tokenizer.pieces))
    assert tokenizer.fingerprint == hashlib.sha256((GOLDEN / "spm.model").read_bytes()).hexdigest()


def test_a_mask_piece_of_the_file_is_used(tmp_path):
    path = train_other_vocabulary(
        tmp_path / "m", user_defined_symbols=["[MASK]"], **DEBERTA_IDS, **DEBERTA_NAMES
    )
    tokenizer = Tokenizer(path)
    assert len(tokenizer) == 300
    assert tokenizer.pieces[tokenizer.mask_id] == "[MASK]"
    assert tokenizer.pieces.count("[MASK]") == 1


def test_both_ways_to_encode_agree_with_sentencepiece():
    tokenizer = Tokenizer(GOLDEN / "spm.model")
    lines = [*TEXT[:50], "", "a\tb", "NUL \x00 and \u2028 inside", "漢字 ß [MASK] [UNK]"]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "spm.model"))
    expected = [plain.encode_as_ids(line) for line in lines]
    assert tokenizer.encode_lines(lines) == expected
    flat = tokenizer.encode_utf8([line.encode() for line in lines])
    assert flat.dtype == np.int32
    assert flat.tolist() == [index for ids in expected for index in ids]
    assert tokenizer.encode_utf8([]).shape == (0,)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), (b"", "is empty"), (b"not a model\n", "not a SentencePiece model")],
)
def test_files_that_are_no_vocabulary(tmp_path, content, complaint):
    path = tmp_path / "spm.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VocabularyError, match=complaint) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


def test_other_ids_are_refused(tmp_path):
    path = train_other_vocabulary(tmp_path / "m")
    with pytest.raises(
        VocabularyError, match=r"<unk> <s> </s>.*\[PAD\] \[CLS\] \[SEP\] \[UNK\].*--train_vocab"
    ):
        Tokenizer(path)


def test_pieces_with_spaces_are_refused(tmp_path):
    path = train_other_vocabulary(
        tmp_path / "m", user_defined_symbols=["of the"], **DEBERTA_IDS, **DEBERTA_NAMES
    )
    with pytest.raises(VocabularyError, match="contain a space"):
        Tokenizer(path)


def test_piece_kinds():
    tokenizer = Tokenizer(GOLDEN / "spm.model")
    kinds = tokenizer.piece_kinds
    assert kinds.dtype == np.int8
    assert kinds.shape == (2001,)
    examples = {"[PAD]": SPECIAL, "[UNK]": SPECIAL, "[MASK]": SPECIAL, "▁the": STARTS_WORD, "▁": STARTS_WORD}
    examples |= {
        "ing": CONTINUES_WORD,
        "s": CONTINUES_WORD,
        ",": PUNCTUATION,
        ".": PUNCTUATION,
        "-": PUNCTUATION,
    }
    for piece, kind in examples.items():
        assert kinds[tokenizer.piece_to_id[piece]] == kind, piece
    for piece, kind in zip(tokenizer.pieces, kinds, strict=True):
        body = piece.removeprefix("▁")
        marks = [
            (33 <= ord(c) < 127 and not c.isalnum()) or unicodedata.category(c).startswith("P") for c in body
        ]
        if kind == PUNCTUATION:
            assert marks
            assert all(marks)
        elif kind != SPECIAL:
            assert not marks or not all(marks)
            assert (kind == STARTS_WORD) == piece.startswith("▁")


def train(sentences: Iterable[str], size: int, path: Path, **options) -> Tokenizer:
    path.write_bytes(train_vocabulary(sentences, size, **options))
    return Tokenizer(path)


def test_training_gives_the_ids_and_the_same_bytes_each_time(tmp_path):
    first = train(iter(TEXT), 400, tmp_path / "a.model")
    assert len(first) == 401
    assert first.fingerprint == train(iter(TEXT), 400, tmp_path / "b.model").fingerprint


def test_training_on_one_long_line(tmp_path):
    line = " ".join(TEXT)
    assert len(line) > 15_000  # SentencePiece alone would drop it and find no text
    assert "▁the" in train([line], 400, tmp_path / "a.model").pieces


def test_trained_vocabularies_cover_the_text(tmp_path):
    """Printable ASCII also where the text has none of it, and rare letters of any alphabet."""
    rare = "Ж ß ø ½ \u05d0 漢 œ"
    tokenizer = train([*TEXT, rare], 500, tmp_path / "a.model")
    texts = ["Yes, we can! {~} <`^> |\\| #VYKQZX", "".join(map(chr, range(32, 127))), rare]
    assert tokenizer.unk_id not in tokenizer.encode_utf8([text.encode() for text in texts])
    assert tokenizer.find_unknown_characters("aЖ漢字\u0301\u2585") == ["\u2585", "字"]
    tokenizer = train([*TEXT, rare], 500, tmp_path / "b.model", character_coverage=0.999)
    assert tokenizer.unk_id not in tokenizer.encode_utf8([text.encode() for text in texts[:2]])
    assert "漢" in tokenizer.find_unknown_characters(rare)


def test_no_sentence_is_dropped_from_training(tmp_path):
    """SentencePiece alone drops those with a NUL or U+2585, and says so only in its own log."""
    sentences = [f"{sentence} zzyzx {character} zzyzx" for character in "\0\u2585" for sentence in TEXT[:50]]
    assert "▁zzyzx" in train(sentences, 300, tmp_path / "a.model").pieces


@pytest.mark.parametrize(
    ("sentences", "size", "complaint"),
    [
        (["hello you"], 500, "too little text"),
        (["hello you"], 6, "printable ASCII take 99; pass more"),
        (["hello you"], 3, "too small"),
        ([], 500, "no text"),
    ],
)
def test_training_that_cannot_work(sentences, size, complaint):
    with pytest.raises(VocabularyError, match=complaint):
        train_vocabulary(sentences, size)


def test_split_at_spaces():
    assert split_at_spaces(b"one two three", 7) == [b"one two", b"three"]
    assert split_at_spaces(b"", 4) == [b""]
    words = b"word " * 1000 + b"x" * 500
    strings = split_at_spaces(words, 64)
    assert max(map(len, strings)) <= 64
    assert b"".join(strings).replace(b" ", b"") == words.replace(b" ", b"")
    without_spaces = ("漢字" * 100).encode()
    strings = split_at_spaces(without_spaces, 64)
    assert max(map(len, strings)) <= 64
    assert "".join(string.decode() for string in strings) == "漢字" * 100


def test_damaged_vocabularies_are_one_error_or_load(tmp_path):
    """Changed, missing and zeroed bytes, half of them among the first pieces; nothing else than the error.

    That is so in `tokenizer.json` of the vocabularies that load, too: they are exported after the training.
    """
    intact = (GOLDEN / "spm.model").read_bytes()
    path, refused = tmp_path / "spm.model", 0
    for seed in range(250):
        generator, damaged = random.Random(seed), bytearray(intact)
        place = generator.randrange(1000 if seed % 2 else len(intact))
        if seed % 5 < 3:
            damaged[place] ^= 1 << generator.randrange(8)
        elif seed % 5 == 3:
            damaged[place : place + generator.randrange(1, 3000)] = bytes(generator.randrange(3000))
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer(path)
        except VocabularyError as error:
            refused += str(path) in str(error)
        else:
            assert len(tokenizer.piece_kinds) == len(tokenizer)
            assert tokenizer.encode_utf8(["hello you, \uff21\ufb01 \u00bd".encode()]).max() < len(tokenizer)
            with contextlib.suppress(VocabularyError):
                written = build_tokenizer_json(tokenizer)["model"]["vocab"]
                assert [piece for piece, _ in written] == tokenizer.pieces[: len(written)]
    assert refused > 150


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    intact = (GOLDEN / "spm.model").read_bytes()
    place = intact.index("▁and".encode()) + len("▁and".encode()) + 1  # behind the tag of the score
    (tmp_path / "m").write_bytes(intact[:place] + struct.pack("<f", float("nan")) + intact[place + 4 :])
    with pytest.raises(VocabularyError, match=r"m is not a SentencePiece model: .*damaged"):
        Tokenizer(tmp_path / "m")
