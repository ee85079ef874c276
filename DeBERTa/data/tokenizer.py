"""SentencePiece with DeBERTa's special ids, and training such a vocabulary from text.

A vocabulary file holds `[PAD]` 0, `[CLS]` 1, `[SEP]` 2, `[UNK]` 3, then the pieces. `[MASK]` is not in the file: it
takes the id right after the last piece, as in the published models.
"""

import hashlib
import string
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from DeBERTa.data.files import open_atomic
from DeBERTa.errors import VocabularyError

WORD_MARK = "\u2581"  # SentencePiece writes it where a space stood
SPECIAL_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # their ids are their places here
MASK_PIECE = "[MASK]"

# Kinds of pieces, for masking whole words.
SPECIAL = 0
STARTS_WORD = 1
CONTINUES_WORD = 2
PUNCTUATION = 3

# SentencePiece drops training sentences above 4192 bytes; longer ones are cut below that.
MAX_SENTENCE_BYTES = 4000
# The result depends on the number of threads (order of float sums), so it does not follow the machine.
TRAINING_THREADS = 4


class Tokenizer:
    """A SentencePiece vocabulary.

    Attributes:
        path: the file it was loaded from.
        pieces: every piece by id; `[MASK]` last, unless the file has a piece of that name already.
        piece_to_id: the inverse of `pieces`.
        pad_id, cls_id, sep_id, unk_id, mask_id: ids of the special pieces.
        special_ids: these five as a frozenset.
        fingerprint: SHA-256 of the file, in hexadecimal.

    Raises VocabularyError if the file is missing, is not a SentencePiece model, has other ids for the special pieces,
    or has pieces that cannot stand in a line of pieces separated by spaces.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise VocabularyError(f"Cannot read the vocabulary {self.path}: {error.strerror}.") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if not model:
            raise VocabularyError(f"{self.path} is empty, not a SentencePiece model.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise VocabularyError(f"{self.path} is not a SentencePiece model.") from error
        self.pieces: list[str] = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        if tuple(self.pieces[:4]) != SPECIAL_PIECES:
            raise VocabularyError(
                f"{self.path} has {' '.join(self.pieces[:4])} at ids 0 to 3 where DeBERTa needs "
                f"{' '.join(SPECIAL_PIECES)}; prepare_data.py --train_vocab makes a fitting vocabulary."
            )
        if any(separator in "".join(self.pieces) for separator in (" ", "\n", "\r")):
            raise VocabularyError(
                f"{self.path} has pieces that contain a space or a line end, which cannot be written as lines of "
                "pieces separated by spaces; train the vocabulary without user-defined pieces of this kind."
            )
        if MASK_PIECE not in self.pieces:
            self.pieces.append(MASK_PIECE)
        self.piece_to_id = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = range(4)
        self.mask_id = self.piece_to_id[MASK_PIECE]
        self.special_ids = frozenset((self.pad_id, self.cls_id, self.sep_id, self.unk_id, self.mask_id))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Ids of every line, encoded on its own, without special ids; pieces not in the vocabulary become `[UNK]`."""
        return self._processor.encode(lines, num_threads=1)

    def encode_utf8(self, lines: list[bytes]) -> np.ndarray:
        """Ids of all lines one after the other, int32 [pieces]; the lines are valid UTF-8. The fastest way in."""
        arrays = self._processor.encode(lines, num_threads=1, out_type="numpy")
        return np.concatenate(arrays) if arrays else np.empty(0, np.int32)

    @cached_property
    def piece_kinds(self) -> np.ndarray:
        """SPECIAL, STARTS_WORD, CONTINUES_WORD or PUNCTUATION for every id, int8 [len(self)].

        Punctuation is a piece which, without its word mark, is made of punctuation only; it stands alone as a word.
        """
        kinds = np.full(len(self.pieces), CONTINUES_WORD, dtype=np.int8)
        for index, piece in enumerate(self.pieces):
            starts_word = piece[0] == WORD_MARK
            body = piece[1:] if starts_word else piece
            if body and not body.isalnum() and all(map(_is_punctuation, body)):
                kinds[index] = PUNCTUATION
            elif starts_word:
                kinds[index] = STARTS_WORD
        kinds[list(self.special_ids)] = SPECIAL
        return kinds


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


def train_vocabulary(sentences: Iterable[str], size: int, path: Path) -> None:
    """Train a unigram vocabulary of `size` pieces, the four special ones included, and write it to `path`.

    The same sentences give the same file. SentencePiece takes about 20 bytes of memory for each byte of text, so feed a
    sample of a large one.
    Raises VocabularyError if the text does not suit the size, and whatever `sentences` raises; nothing is written then.
    """
    if size <= len(SPECIAL_PIECES):
        raise VocabularyError(f"A vocabulary of {size} pieces is too small; ask for some thousands.")
    feeding_errors: list[Exception] = []
    try:
        with open_atomic(path) as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_short_sentences(sentences, feeding_errors),
                model_writer=file,
                model_type="unigram",
                vocab_size=size,
                normalization_rule_name="nmt_nfkc",
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece="[PAD]",
                bos_piece="[CLS]",
                eos_piece="[SEP]",
                unk_piece="[UNK]",
                num_threads=TRAINING_THREADS,
                minloglevel=2,
            )
    except RuntimeError as error:
        if feeding_errors:
            raise feeding_errors[0] from None
        raise VocabularyError(_explain_training_error(str(error), size)) from error


def _explain_training_error(message: str, size: int) -> str:
    if "Vocabulary size too high" in message:
        limit = message.rpartition("<=")[2].strip(" .")
        return f"There is too little text for a vocabulary of {size} pieces: it gives at most {limit}; ask for fewer."
    if "smaller than required_chars" in message:
        return f"The text has more different characters than a vocabulary of {size} pieces can hold; ask for more."
    if "sentences_.empty()" in message:
        return "There is no text to train a vocabulary on."
    return f"SentencePiece could not train a vocabulary of {size} pieces: {message}"


def _short_sentences(sentences: Iterable[str], errors: list[Exception]) -> Iterator[str]:
    """The sentences, none too long for SentencePiece; an error in them is kept in `errors`, to be raised again."""
    try:
        for sentence in sentences:
            for part in split_at_spaces(sentence.encode(), MAX_SENTENCE_BYTES):
                yield part.decode()
    except Exception as error:
        errors.append(error)
        raise


def split_at_spaces(line: bytes, limit: int) -> list[bytes]:
    """Cut UTF-8 text into parts of at most `limit` bytes, at spaces or, without any, between characters.

    SentencePiece's pieces do not cross spaces, so a cut at a space changes none. The spaces at the cuts are dropped.
    """
    parts = []
    start = 0
    while len(line) - start > limit:
        cut = line.rfind(b" ", start + 1, start + limit + 1)
        following = cut + 1
        if cut < 0:
            cut = following = find_character_boundary(line, start + limit)
        parts.append(line[start:cut])
        start = following
    parts.append(line[start:])
    return parts


def find_character_boundary(data: bytes, position: int) -> int:
    """The last position not after `position` where a UTF-8 character begins; `position` itself in other text."""
    for candidate in range(position, max(position - 4, 0), -1):
        if candidate >= len(data) or data[candidate] & 0xC0 != 0x80:
            return candidate
    return position
