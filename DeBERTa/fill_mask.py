"""Predict masked tokens: `python -m DeBERTa.fill_mask DIR "The capital of France is [MASK]."`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from DeBERTa.command import run_command
from DeBERTa.data.tokenizer import WORD_MARK
from DeBERTa.flags import FlagParser
from DeBERTa.hub.inference import TokenProbability, fill_masks, open_masked_lm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: show_predictions(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags."""
    parser = FlagParser(
        prog="python -m DeBERTa.fill_mask", description="Predict the [MASK] tokens of a text."
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="model directory: RUN/model or RUN/generator")
    parser.add_argument("text", metavar="TEXT", help="text with [MASK] in place of words")
    parser.add_argument(
        "--top_k", type=int, default=5, metavar="N", help="predictions per [MASK] (default: 5)"
    )
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1:
        parser.error(f"--top_k must be at least 1, not {arguments.top_k}")
    return arguments


def show_predictions(arguments: argparse.Namespace) -> None:
    """Print the most probable tokens of every mask, one per line."""
    model, encoder = open_masked_lm(arguments.model)
    blocks = fill_masks(model, encoder, arguments.text, arguments.top_k)
    sys.stdout.write("\n\n".join(map(format_lines, blocks)) + "\n")


def format_lines(predictions: list[TokenProbability]) -> str:
    """Return a line per prediction."""
    return "\n".join(
        f"{probability:7.2%}  {piece.replace(WORD_MARK, ' ')}" for piece, probability in predictions
    )


if __name__ == "__main__":
    sys.exit(main())
