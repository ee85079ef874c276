"""Training of a vocabulary on a text, once.

`spm.model.json` next to a vocabulary `spm.model` records what it was trained on.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from DeBERTa.data.files import commit, get_state, hash_file, open_atomic, open_partial
from DeBERTa.data.text import read_training_sentences
from DeBERTa.data.tokenizer import WORD_MARK, Tokenizer, train_vocabulary
from DeBERTa.errors import VocabularyError

SHOWN_CHARACTERS = 20
MANY_CHARACTERS, MANY_SHARE = 256, 0.25  # pieces that are single characters, and their share

logger = logging.getLogger(__name__)


def find_or_train_vocabulary(
    source: Path, size: int, path: Path, errors: str = "strict", character_coverage: float = 1.0
) -> Path:
    """Return `path`, the vocabulary of `size` pieces trained on `source`.

    The vocabulary is trained if needed. Another vocabulary at `path` is never overwritten: it raises
    `VocabularyError`. Other errors are those of `train_vocabulary`.
    """
    record = path.with_name(path.name + ".json")
    recipe = {"pieces": size, "character_coverage": character_coverage}
    if _is_trained(source, recipe, path, record):
        return path
    refusal = VocabularyError(
        f"cannot write a vocabulary to {path}: the one there was not trained with {size} pieces and "
        f"character coverage {character_coverage} on {source}; give another --vocab_path, or remove it"
    )
    with open_partial(record) as file:
        # Another process may have trained it while this one waited for the lock.
        if _is_trained(source, recipe, path, record):
            return path
        if path.exists() and record.exists():
            raise refusal
        logger.info("training a vocabulary of %d pieces on %s", size, source)
        characters: set[str] = set()
        sentences = _collect_characters(read_training_sentences(source, errors), characters)
        model = train_vocabulary(sentences, size, character_coverage)
        # A process killed before it wrote the record left the same bytes; other bytes are another vocabulary.
        if path.exists() and path.read_bytes() != model:
            raise refusal
        with open_atomic(path) as model_file:
            model_file.write(model)
        values = {"text": hash_file(source), "vocabulary": hash_file(path)}
        file.write(json.dumps(recipe | values | _describe_source(source), indent=1).encode())
        commit(file, record)
    _report_characters(Tokenizer(path), characters)
    return path


def _describe_source(source: Path) -> dict[str, Any]:
    return {"input": str(source.resolve()), **get_state(source.stat())}


def _is_trained(source: Path, recipe: dict[str, Any], path: Path, record: Path) -> bool:
    """Return whether `path` is the vocabulary trained on `source` by this recipe."""
    try:
        values = json.loads(record.read_text())
        if not recipe.items() <= values.items() or values["vocabulary"] != hash_file(path):
            return False
        return _describe_source(source).items() <= values.items() or values["text"] == hash_file(source)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _collect_characters(sentences: Iterable[str], characters: set[str]) -> Iterator[str]:
    """Yield the sentences, and add their characters to the set."""
    for sentence in sentences:
        characters.update(sentence)
        yield sentence


def _report_characters(tokenizer: Tokenizer, characters: set[str]) -> None:
    """Warn of characters of the text that the vocabulary leaves out, and of a vocabulary full of them."""
    missing = tokenizer.find_unknown_characters(characters)
    if missing:
        shown = " ".join(f"{char} (U+{ord(char):04X})" for char in missing[:SHOWN_CHARACTERS])
        more = f" and {len(missing) - SHOWN_CHARACTERS} more" if len(missing) > SHOWN_CHARACTERS else ""
        logger.warning("characters of the text left out of the vocabulary become [UNK]: %s%s", shown, more)
    single = sum(len(piece.removeprefix(WORD_MARK)) <= 1 for piece in tokenizer.pieces)
    if single > max(MANY_CHARACTERS, MANY_SHARE * len(tokenizer)):
        logger.warning(
            "%d of the %d pieces of %s are single characters; --character_coverage 0.9995 leaves out rare "
            "ones, or pass a larger --train_vocab",
            single, len(tokenizer), tokenizer.path,
        )  # fmt: skip
