"""Training of a vocabulary on a text, once.

`spm.model.json` next to a vocabulary `spm.model` records what it was trained on.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from DeBERTa.data.files import commit, hash_file, open_atomic, open_partial
from DeBERTa.data.sources import (
    SAMPLE_BLOCK_BYTES,
    STDIN,
    Reading,
    describe_sources,
    sample_lines,
)
from DeBERTa.data.tokenizer import WORD_MARK, Tokenizer, train_vocabulary
from DeBERTa.errors import DataError, VocabularyError

SHOWN_CHARACTERS = 20
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
    state = describe_sources(sources)
    if _is_trained(path, record, recipe | state):
        return path
    name = f"{sources[0]}" if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
    refusal = VocabularyError(
        f"cannot write a vocabulary to {path}: the one there was not trained with {size} pieces and "
        f"character coverage {character_coverage} on {name}; give another --vocab_path, or remove it"
    )
    with open_partial(record) as file:
        # Another process may have trained it while this one waited for the lock.
        if _is_trained(path, record, recipe | state):
            return path
        lines = sample_lines(sources, replace(reading or Reading(), block_bytes=SAMPLE_BLOCK_BYTES))
        recipe["sample_sha256"] = hashlib.sha256(b"\n".join(lines)).hexdigest()
        if not _is_trained(path, record, recipe):
            if path.exists() and record.exists():
                raise refusal
            logger.info("training a vocabulary of %d pieces on %s", size, name)
            model = train_vocabulary((line.decode() for line in lines), size, character_coverage)
            # A process killed before it wrote the record left the same bytes.
            if path.exists() and path.read_bytes() != model:
                raise refusal
            with open_atomic(path) as model_file:
                model_file.write(model)
            _report_characters(Tokenizer(path), lines)
        file.write(json.dumps(recipe | state | {"vocabulary_sha256": hash_file(path)}, indent=1).encode())
        commit(file, record)
    return path


def _is_trained(path: Path, record: Path, recipe: dict[str, Any]) -> bool:
    """Return whether `path` is a vocabulary that was trained by this recipe."""
    try:
        values = json.loads(record.read_text())
        return recipe.items() <= values.items() and values["vocabulary_sha256"] == hash_file(path)
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return False


def _report_characters(tokenizer: Tokenizer, lines: Sequence[bytes]) -> None:
    """Warn of characters of the text that the vocabulary leaves out, and of a vocabulary full of them."""
    characters: set[str] = set()
    for line in lines:
        characters.update(line.decode())
    missing = tokenizer.find_unknown_characters(characters)
    if missing:
        shown = " ".join(f"{char} (U+{ord(char):04X})" for char in missing[:SHOWN_CHARACTERS])
        more = f" and {len(missing) - SHOWN_CHARACTERS} more" if len(missing) > SHOWN_CHARACTERS else ""
        logger.warning("characters of the text missing from the vocabulary become [UNK]: %s%s", shown, more)
    single = sum(len(piece.removeprefix(WORD_MARK)) <= 1 for piece in tokenizer.pieces)
    if single > max(MANY_CHARACTERS, MANY_SHARE * len(tokenizer)):
        logger.warning(
            "%d of the %d pieces of %s are single characters; --character_coverage 0.9995 leaves out rare "
            "ones, or pass a larger --train_vocab",
            single, len(tokenizer), tokenizer.path,
        )  # fmt: skip
