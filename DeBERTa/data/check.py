"""A report of how a vocabulary fits a text."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from DeBERTa.data.encode import Recipe
from DeBERTa.data.sources import SAMPLE_BLOCK_BYTES, sample_documents
from DeBERTa.data.text import split_lines
from DeBERTa.data.tokenizer import Tokenizer

CHECKED_BYTES = 10 << 20
EXAMPLES = 20


def check_text(sources: Sequence[Path], recipe: Recipe) -> str:
    """Return a report about a sample of at most about 10 MB of the texts.

    It has pieces per word, [UNK]s with examples, characters that normalization removes or changes, and the
    lengths of documents in pieces. Raises `DataError` or `VocabularyError`.
    """
    tokenizer = Tokenizer(recipe.vocabulary)
    reading = replace(recipe.reading, block_bytes=SAMPLE_BLOCK_BYTES)
    lengths: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    pieces = words = 0
    for document in sample_documents(sources, reading, CHECKED_BYTES):
        lines = [line.decode() for line in split_lines(document)]
        ids = [each for line in tokenizer.encode_lines(lines) for each in line]
        if not ids:
            continue
        lengths[len(ids).bit_length()] += 1
        pieces += len(ids)
        for line in lines:
            words += len(line.split())
            characters.update(line)
        if tokenizer.unk_id in ids:
            unknown.update(tokenizer.find_unknown(lines))
    removed, changed = _find_normalized(tokenizer, characters)
    bins = sorted(lengths)
    share = sum(unknown.values()) / max(pieces, 1)
    return "\n".join(
        [
            f"vocabulary {tokenizer.path}: {len(tokenizer)} pieces",
            f"text: {sum(lengths.values()):,} documents, {words:,} words, {pieces:,} pieces, "
            f"{pieces / max(words, 1):.2f} pieces per word",
            f"[UNK]: {sum(unknown.values()):,} ({share:.3%} of the pieces){_show(unknown)}",
            f"characters that normalization removes: {sum(removed.values()):,}{_show(removed)}",
            f"characters that normalization changes: {sum(changed.values()):,}{_show(changed)}",
            "documents by length in pieces:",
            *(f"  {1 << bits >> 1:>9,} to {(1 << bits) - 1:>9,}: {lengths[bits]:,}" for bits in bins),
        ]
    )


def _find_normalized(tokenizer: Tokenizer, characters: Counter[str]) -> tuple[Counter[str], Counter[str]]:
    """Return the characters that normalization removes, and those that it changes, with their counts."""
    removed: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for character, count in characters.items():
        normalized = tokenizer.normalize(character)
        if not normalized and not character.isspace():
            removed[character] = count
        elif normalized != character and not character.isspace():
            changed[f"{character} to {normalized}"] = count
    return removed, changed


def _show(counts: Counter[str]) -> str:
    """Return the most frequent ones, with names of characters that cannot be seen."""
    if not counts:
        return ""
    shown = [f"{_describe(text)} ({count:,})" for text, count in counts.most_common(EXAMPLES)]
    return (
        ": " + ", ".join(shown) + (f", and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else "")
    )


def _describe(text: str) -> str:
    if len(text) > 1 or text.isprintable():
        return text
    return f"U+{ord(text):04X} {unicodedata.name(text, '')}".strip()
