"""Training of a vocabulary on a text, once, and reports of how one fits a text.

`spm.model.json` next to a vocabulary `spm.model` records what it was trained on.
"""

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from DeBERTa.data.encode import Recipe
from DeBERTa.data.sources import STDIN, Reading, hash_states, name_sources, sample_documents, sample_lines
from DeBERTa.data.text import split_lines
from DeBERTa.data.tokenizer import WORD_MARK, Tokenizer, train_vocabulary
from DeBERTa.errors import DataError, VocabularyError
from DeBERTa.files import commit, hash_file, is_recorded, open_atomic, open_partial, read_file

CHECKED_BYTES = 10 << 20
EXAMPLES = 20  # shown of a set
MANY_CHARACTERS, MANY_SHARE = 256, 0.25  # pieces that are single characters, and their share

logger = logging.getLogger(__name__)


def find_or_train_vocabulary(
    sources: Sequence[Path],
    size: int,
    path: Path,
    reading: Reading | None = None,
    character_coverage: float = 1.0,
) -> Path:
    """Return `path`, the vocabulary of `size` pieces trained on a sample of the texts.

    The vocabulary is trained if needed. Another vocabulary at `path` is never overwritten: it raises
    `VocabularyError`. Other errors are those of `train_vocabulary` and of reading.
    """
    if STDIN in sources:
        raise DataError("cannot train a vocabulary on standard input: it can be read only once; give a file")
    record = path.with_name(path.name + ".json")
    recipe: dict[str, Any] = {"pieces": size, "character_coverage": character_coverage}
    state = {"inputs_sha256": hash_states(sources)}
    if _is_trained(path, record, recipe | state):
        return path
    with open_partial(record) as file:
        if _is_trained(path, record, recipe | state):  # by the process that held the lock
            return path
        lines = sample_lines(sources, reading or Reading())
        recipe["sample_sha256"] = hashlib.sha256(b"\n".join(lines)).hexdigest()
        if not _is_trained(path, record, recipe):
            refusal = VocabularyError(
                f"cannot write a vocabulary to {path}: the one there was not trained with {size} pieces and "
                f"character coverage {character_coverage} on {name_sources(sources)}, or was changed since; "
                "give another --vocab_path, or remove it"
            )
            if path.exists() and record.exists():
                raise refusal
            logger.info("training a vocabulary of %d pieces on %s", size, name_sources(sources))
            model = train_vocabulary((line.decode() for line in lines), size, character_coverage)
            # A process killed before it wrote the record left the same bytes.
            if path.exists() and read_file(path) != model:
                raise refusal
            with open_atomic(path) as model_file:
                model_file.write(model)
            _report_characters(Tokenizer(path), lines)
        file.write(json.dumps(recipe | state | {"vocabulary_sha256": hash_file(path)}, indent=1).encode())
        commit(file, record)
    return path


def _is_trained(path: Path, record: Path, recipe: dict[str, Any]) -> bool:
    """Return whether `path` is a vocabulary that was trained by this recipe."""
    return path.is_file() and is_recorded(record, recipe | {"vocabulary_sha256": hash_file(path)})


def _report_characters(tokenizer: Tokenizer, lines: Sequence[bytes]) -> None:
    """Warn of characters that the vocabulary lacks, and of one full of characters."""
    missing = tokenizer.find_unknown_characters(set(chain.from_iterable(map(bytes.decode, lines))))
    if missing:
        shown = " ".join(f"{char} (U+{ord(char):04X})" for char in missing[:EXAMPLES])
        more = f" and {len(missing) - EXAMPLES} more" if len(missing) > EXAMPLES else ""
        logger.warning("characters of the text missing from the vocabulary become [UNK]: %s%s", shown, more)
    single = sum(len(piece.removeprefix(WORD_MARK)) <= 1 for piece in tokenizer.pieces)
    if single > max(MANY_CHARACTERS, MANY_SHARE * len(tokenizer)):
        logger.warning(
            "%d of the %d pieces of %s are single characters; a lower --character_coverage leaves out rare "
            "ones (0.9995 for large scripts), or pass a larger --train_vocab",
            single, len(tokenizer), tokenizer.path,
        )  # fmt: skip


def check_text(sources: Sequence[Path], recipe: Recipe) -> str:
    """Return a report about a sample of at most about 10 MB of the texts.

    It has pieces per word, [UNK]s with examples, characters that normalization removes or changes, and the
    lengths of documents in pieces. Raises `DataError` or `VocabularyError`.
    """
    tokenizer = Tokenizer(recipe.vocabulary)
    lengths: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    pieces = words = 0
    for document in sample_documents(sources, recipe.reading, CHECKED_BYTES):
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
    """Return characters that normalization removes, and changes, with counts."""
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
    shown = ", ".join(f"{_describe(text)} ({count:,})" for text, count in counts.most_common(EXAMPLES))
    more = f", and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else ""
    return f": {shown}{more}" if shown else ""


def _describe(text: str) -> str:
    if len(text) > 1 or text.isprintable():
        return text
    return f"U+{ord(text):04X} {unicodedata.name(text, '')}".strip()
