"""A SentencePiece vocabulary as files for `AutoTokenizer` of transformers.

`tokenizer.json` is the format of the tokenizers library. `spm.model` holds everything that it needs; the file
is parsed here, because sentencepiece does not return the map of the normalizer. `PreTrainedTokenizerFast` is
the class that uses `tokenizer.json` as it is: `DebertaV2Tokenizer` of transformers 5 replaces the normalizer.
"""

import base64
import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from DeBERTa.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, WORD_MARK, Tokenizer
from DeBERTa.errors import VocabularyError

# Tags in sentencepiece_model.proto: the number of the field times 8, plus the wire type. Protobuf ignores a
# field of another wire type.
PIECES, TRAINER, NORMALIZER = 1 << 3 | 2, 2 << 3 | 2, 3 << 3 | 2
PIECE, SCORE, KIND = 1 << 3 | 2, 2 << 3 | 5, 3 << 3
MODEL_TYPE = 3 << 3
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
CHARACTER_MAP, ADD_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2 << 3 | 2, 3 << 3, 4 << 3, 5 << 3
NORMAL_PIECE = 1
VARINT, BYTES, FIXED_SIZES = 0, 2, {1: 8, 5: 4}  # wire types of protobuf


def iterate_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield tag and value of every field of a protobuf message.

    A value is an integer or bytes. Raises `ValueError` or `IndexError` for a message that cannot be parsed.
    """
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        number = FIXED_SIZES.get(key & 7)
        if number is None:
            if key & 7 not in (VARINT, BYTES):
                raise ValueError(f"wire type {key & 7}")
            number, position = _read_varint(message, position)
        if key & 7 == VARINT:
            yield key, number
        else:  # bytes, as many as the number
            yield key, message[position : position + number]
            position += number


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position`, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def build_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`, which gives the ids of `tokenizer`.

    `[MASK]` and the other special pieces in a text become their ids, and text after them does not start a
    word unless a space precedes it. Raises `VocabularyError` for a vocabulary that this format cannot
    express.
    """
    messages: dict[int, list] = defaultdict(list)
    try:
        for tag, value in iterate_fields(tokenizer.path.read_bytes()):
            messages[tag].append(value)
        pieces = [dict(iterate_fields(message)) for message in messages[PIECES]]
        # Later fields override earlier ones: protobuf merges messages by concatenation.
        trainer, normalizer = (dict(iterate_fields(b"".join(messages[n]))) for n in (TRAINER, NORMALIZER))
    except (IndexError, ValueError) as error:
        raise VocabularyError(f"{tokenizer.path} cannot be parsed: it is damaged; fetch it again") from error
    if obstacle := _find_obstacle(tokenizer, pieces, trainer, normalizer):
        raise VocabularyError(
            f"cannot write {tokenizer.path} for transformers: {obstacle}; "
            "train a vocabulary with prepare_data.py --train_vocab"
        )
    characters = normalizer.get(CHARACTER_MAP)  # none: the identity
    precompiled = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(characters or b"").decode(),
    }
    vocabulary = [
        (piece[PIECE].decode(), struct.unpack("<f", piece.get(SCORE, bytes(4)))[0]) for piece in pieces
    ]
    metaspace = {"type": "Metaspace", "replacement": WORD_MARK, "prepend_scheme": "first", "split": True}
    added = [*zip(range(4), SPECIAL_PIECES, strict=True), (tokenizer.mask_id, MASK_PIECE)]
    sequence_a, sequence_b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    cls, sep, second_sep = (
        {"SpecialToken": {"id": name, "type_id": i}} for name, i in (("[CLS]", 0), ("[SEP]", 0), ("[SEP]", 1))
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": piece, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for index, piece in added
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([precompiled] if characters else []),
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                {"type": "Replace", "pattern": {"Regex": " \\z"}, "content": ""},
            ],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, sequence_a, sep],
            "pair": [cls, sequence_a, sep, sequence_b, second_sep],
            "special_tokens": {
                piece: {"id": piece, "ids": [index], "tokens": [piece]}
                for piece, index in (("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id))
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "vocab": vocabulary,
            "byte_fallback": False,
        },
    }


def _find_obstacle(tokenizer: Tokenizer, pieces: list[dict], trainer: dict, normalizer: dict) -> str | None:
    """Return what this vocabulary does and `tokenizer.json` cannot, or None."""
    model_type = MODEL_TYPES.get(trainer.get(MODEL_TYPE, 1), "unknown")
    if model_type != "unigram":
        return f"its model type is {model_type}, not unigram"
    if not all(normalizer.get(option, 1) for option in (ADD_PREFIX, REMOVE_SPACES, ESCAPE_SPACES)):
        return "its normalizer treats spaces in another way"
    for index, piece in enumerate(pieces):
        if index not in tokenizer.special_ids and piece.get(KIND, NORMAL_PIECE) != NORMAL_PIECE:
            return f"piece {index} is not of the normal kind"
        if WORD_MARK in tokenizer.pieces[index].lstrip(WORD_MARK):
            return f"piece {index} has a space after other characters"
    return None


def build_tokenizer_config(max_length: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    special = {"bos": "[CLS]", "eos": "[SEP]", "cls": "[CLS]", "sep": "[SEP]"}
    special |= {"pad": "[PAD]", "unk": "[UNK]", "mask": MASK_PIECE}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": piece for name, piece in special.items()},
    }
