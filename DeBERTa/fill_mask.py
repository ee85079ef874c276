"""Predict masked tokens of a text.

`python -m DeBERTa.fill_mask DIR "The capital of France is [MASK]."`
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from DeBERTa.command import run_command, write_output
from DeBERTa.flags import FlagParser
from DeBERTa.hub.inference import fill_masks, open_model
from DeBERTa.model.pretraining import MaskedLanguageModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: show_predictions(argv))


def show_predictions(argv: Sequence[str] | None) -> None:
    """Print the most probable tokens of every mask, one per line."""
    parser = FlagParser(prog="python -m DeBERTa.fill_mask", description="Predict masked tokens.")
    parser.add_argument("model", type=Path, metavar="DIR", help="model directory: RUN/model or RUN/generator")
    parser.add_argument("text", metavar="TEXT", help="text with [MASK] in place of words")
    parser.add_argument("--top_k", type=int, default=5, metavar="N", help="per [MASK] (default: 5)")
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1:
        parser.error(f"--top_k must be at least 1, not {arguments.top_k}")
    model, tokenizer = open_model(arguments.model, MaskedLanguageModel)
    blocks = fill_masks(model, tokenizer, arguments.text, arguments.top_k)
    lines = ("\n".join(f"{token.probability:7.2%}  {token.text}" for token in block) for block in blocks)
    write_output("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
