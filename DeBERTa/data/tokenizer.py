"""SentencePiece with DeBERTa's special ids, and training of vocabularies.

A vocabulary file holds `[PAD]` 0, `[CLS]` 1, `[SEP]` 2, `[UNK]` 3, then the pieces. `[MASK]` is not in the
file: it takes the id right after the last piece, as in the published models.
"""

import hashlib
import io
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from DeBERTa.errors import VocabularyError
from DeBERTa.files import read_file

WORD_MARK = "\u2581"  # SentencePiece writes it in place of a space
SPECIAL_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # their ids are 0 to 3
MASK_PIECE = "[MASK]"

ROLES = ("pad", "bos", "eos", "unk")  # what SentencePiece calls them
SPECIAL, STARTS_WORD, CONTINUES_WORD, PUNCTUATION = range(4)  # kinds of pieces, for masking of words

# SentencePiece drops training sentences above 4192 bytes; longer ones are split below that.
MAX_SENTENCE_BYTES = 4000
# SentencePiece also drops sentences with these characters: it uses U+2585 itself.
DROPPING = {0: " ", 0x2585: " "}
PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
# Fixed, since the result depends on the number of threads (order of float sums).
TRAINING_THREADS = 4
# A NormalizerSpec to append to a SentencePiece model: it overrides one field, so that no word mark is added.
NO_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece vocabulary.

    Attributes:
        path: the file it was loaded from.
        pieces: every piece by id; `[MASK]` last, unless the file has a piece of that name already.
        piece_to_id: the inverse of `pieces`.
        pad_id, cls_id, sep_id, unk_id, mask_id: ids of the special pieces.
        special_ids: these five as a frozenset.
        fingerprint: SHA-256 of the file, in hexadecimal.

    Raises `VocabularyError` if the file is missing or not a SentencePiece model, has other ids for the
    special pieces, or has pieces with spaces or line ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = read_file(self.path)
        except OSError as error:
            what = f"cannot read the vocabulary {self.path}"
            raise VocabularyError(f"{what}: {error.strerror}; check the path") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            if not model:
                raise ValueError("no model")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            ids = list(range(self._processor.get_piece_size()))
            self.pieces: list[str] = self._processor.id_to_piece(ids)
            if not np.isfinite(self._processor.get_score(ids)).all():
                raise ValueError("scores that are no numbers")
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            why = "it cannot be parsed or is damaged" if model else "it is empty"
            raise VocabularyError(
                f"{self.path} is not a SentencePiece model: {why}; fetch it again"
            ) from error
        if tuple(self.pieces[:4]) != SPECIAL_PIECES:
            raise VocabularyError(
                f"{self.path} is not a vocabulary for DeBERTa: ids 0 to 3 are {' '.join(self.pieces[:4])}, "
                f"not {' '.join(SPECIAL_PIECES)}; train one with prepare_data.py --train_vocab"
            )
        if any(separator in "".join(self.pieces) for separator in (" ", "\n", "\r")):
            raise VocabularyError(
                f"{self.path} cannot be used: some pieces contain a space or a line end, which separate "
                "pieces in a prepared text; train the vocabulary without such user-defined pieces"
            )
        if MASK_PIECE not in self.pieces:
            self.pieces.append(MASK_PIECE)
        self.piece_to_id = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = range(4)
        self.mask_id = self.piece_to_id[MASK_PIECE]
        self.special_ids = frozenset((*range(4), self.mask_id))

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.pieces)

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Return the ids per line, without special ids; unknown pieces become `[UNK]`."""
        return self._processor.encode(lines, num_threads=1)

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of text inside a word, in front of which no word mark is added."""
        return self._inside.encode(text)

    @cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=read_file(self.path) + NO_PREFIX)

    def encode_utf8(self, lines: list[bytes]) -> np.ndarray:
        """Return the concatenated ids of lines of valid UTF-8, int32 [pieces]."""
        arrays = self._processor.encode(lines, num_threads=1, out_type="numpy")
        return np.concatenate(arrays) if arrays else np.empty(0, np.int32)

    def find_unknown_characters(self, characters: Iterable[str]) -> list[str]:
        """Return the characters that become [UNK], in order of their code points.

        Combining characters are not returned: most are part of other characters after normalization.
        """
        tried = sorted(character for character in characters if not unicodedata.combining(character))
        encoded = zip(tried, self.encode_lines(tried), strict=True)
        return [character for character, ids in encoded if self.unk_id in ids]

    def find_unknown(self, lines: list[str]) -> list[str]:
        """Return the parts of the lines, after normalization, that become [UNK]."""
        encoded = self._processor.encode(lines, out_type=str, num_threads=1)
        return [piece for line in encoded for piece in line if piece not in self.piece_to_id]

    def normalize(self, text: str) -> str:
        """Return a text as the vocabulary normalizes it, without the mark at its start.

        The vocabulary adds that mark.
        """
        return self._processor.normalize(text).removeprefix(WORD_MARK).replace(WORD_MARK, " ")

    @cached_property
    def piece_kinds(self) -> np.ndarray:
        """Return the kind of piece per id, int8 [ids].

        Kinds are SPECIAL, STARTS_WORD, CONTINUES_WORD and PUNCTUATION. A piece is punctuation if, apart from
        its word mark, it consists of punctuation only. Punctuation is a word by itself.
        """
        kinds = np.full(len(self.pieces), CONTINUES_WORD, dtype=np.int8)
        for index, piece in enumerate(self.pieces):
            body = piece.removeprefix(WORD_MARK)
            if body and not body.isalnum() and all(map(_is_punctuation, body)):
                kinds[index] = PUNCTUATION
            elif piece.startswith(WORD_MARK):
                kinds[index] = STARTS_WORD
        kinds[list(self.special_ids)] = SPECIAL
        return kinds


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


def train_vocabulary(sentences: Iterable[str], size: int, character_coverage: float = 1.0) -> bytes:
    """Train a unigram vocabulary of `size` pieces; return the model.

    The size includes special pieces. The same sentences give the same bytes. SentencePiece takes about 20
    bytes of memory per byte of text, so pass a sample of a large text. The pieces cover printable ASCII, and
    at least the share `character_coverage` of the characters of the sentences; rarer ones become [UNK].

    Raises `VocabularyError` if the text does not suit the size.
    """
    failure = f"cannot train a vocabulary of {size} pieces"
    if size <= len(SPECIAL_PIECES):
        raise VocabularyError(f"{failure}: it is too small; pass some thousands")
    special: dict[str, Any] = {f"{role}_id": index for index, role in enumerate(ROLES)}
    special |= {f"{role}_piece": piece for role, piece in zip(ROLES, SPECIAL_PIECES, strict=True)}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_split_sentences(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=character_coverage,
            required_chars=PRINTABLE,
            normalization_rule_name="nmt_nfkc",
            num_threads=TRAINING_THREADS,
            minloglevel=2,
            **special,
        )
    except RuntimeError as error:
        raise VocabularyError(f"{failure}: {_explain_training_error(str(error))}") from error
    return model.getvalue()


def _explain_training_error(message: str) -> str:
    """Return why SentencePiece raised an error, and what to do."""
    if "Vocabulary size too high" in message:
        limit = message.rpartition("<=")[2].strip(" .")
        return f"there is too little text for more than {limit}; pass a smaller number"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        advice = "pass more, or leave out rare characters of the text by --character_coverage 0.9995"
        return f"its characters and printable ASCII take {found[1]}; {advice}"
    if "sentences_.empty()" in message:
        return "there is no text; check the input"
    return f"{message}; pass another number"


def _split_sentences(sentences: Iterable[str]) -> Iterator[str]:
    """Yield the sentences, split, with spaces for characters that are refused.

    SentencePiece drops a sentence with such a character.
    """
    for sentence in sentences:
        for part in split_at_spaces(sentence.translate(DROPPING).encode(), MAX_SENTENCE_BYTES):
            yield part.decode()


def split_at_spaces(line: bytes, limit: int) -> list[bytes]:
    """Split UTF-8 text into strings of at most `limit` bytes.

    The text is split at spaces, which are dropped, or between characters if there are none. SentencePiece's
    pieces do not cross spaces, so that a split at a space changes no piece.
    """
    strings, start = [], 0
    while len(line) - start > limit:
        space = line.rfind(b" ", start + 1, start + limit + 1)
        end = space if space >= 0 else find_character_boundary(line, start + limit)
        strings.append(line[start:end])
        start = end + (space >= 0)
    return [*strings, line[start:]]


def find_character_boundary(data: bytes, position: int) -> int:
    """Return the last position up to `position` where a UTF-8 character begins.

    If the text is not UTF-8, `position` itself is returned.
    """
    for candidate in range(position, max(position - 4, 0), -1):
        if candidate >= len(data) or data[candidate] & 0xC0 != 0x80:
            return candidate
    return position
