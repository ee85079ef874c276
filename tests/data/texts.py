"""Preparation of one text, as most tests need it."""

from pathlib import Path

from DeBERTa.data.encode import Recipe
from DeBERTa.data.prepare import PreparedText, prepare_outputs
from DeBERTa.data.sources import BLOCK_BYTES, Reading


def prepare(
    source: Path,
    output: Path,
    vocabulary: Path,
    max_seq_length: int = 512,
    errors: str = "strict",
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> PreparedText:
    """Write `output` and its token ids from the text `source`."""
    recipe = Recipe(vocabulary, Reading(errors=errors, block_bytes=block_bytes))
    return prepare_outputs([source], [output], recipe, max_seq_length, workers)[0]
