"""Show which tokens of a text look replaced: `python -m DeBERTa.detect DIR TEXT`."""

import html
import sys
from collections.abc import Sequence
from pathlib import Path

from DeBERTa.command import run_command, write_output
from DeBERTa.flags import FlagParser
from DeBERTa.hub.inference import TokenProbability, detect_replaced, open_model
from DeBERTa.model.pretraining import ReplacedTokenDetectionModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: show_tokens(argv))


def show_tokens(argv: Sequence[str] | None) -> None:
    """Print every token with the probability that it was replaced."""
    parser = FlagParser(prog="python -m DeBERTa.detect", description="Show which tokens look replaced.")
    parser.add_argument("model", type=Path, metavar="DIR", help="model directory: RUN/discriminator")
    parser.add_argument("text", metavar="TEXT", help="the text")
    parser.add_argument("--html", action="store_true", help="print a page instead of lines")
    arguments = parser.parse_args(argv)
    tokens = detect_replaced(*open_model(arguments.model, ReplacedTokenDetectionModel), arguments.text)
    write_output(format_page(tokens) if arguments.html else format_lines(tokens, sys.stdout.isatty()))


def format_lines(tokens: list[TokenProbability], is_terminal: bool) -> str:
    """Return a line per token, and the text, colored on a terminal.

    Colors go from black to red.
    """
    lines, colored = [], ""
    for token in tokens:
        text = token.text
        if is_terminal:
            red = round(token.probability * 5)  # of the 6 x 6 x 6 colors of a terminal
            text = f"\x1b[48;5;{16 + 36 * red}m\x1b[97m{text}\x1b[0m"
        lines.append(f"{token.probability:7.2%}  {text}")
        colored += text
    return "\n".join([*lines, colored] if is_terminal else lines) + "\n"


def escape(text: str) -> str:
    """Return text as HTML in ASCII, which is right in every encoding of the output."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def format_page(tokens: list[TokenProbability]) -> str:
    """Return an HTML page of the text: probabilities are backgrounds and tooltips."""
    spans = [
        f'<span style="background: rgba(220, 30, 30, {token.probability:.3f})" '
        f'title="{token.probability:.2%}">{escape(token.text)}</span>'
        for token in tokens
    ]
    return (
        '<!DOCTYPE html>\n<html>\n<head><meta charset="utf-8"><title>Replaced tokens</title></head>\n'
        f'<body style="font-family: sans-serif; white-space: pre-wrap">{"".join(spans)}</body>\n</html>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
