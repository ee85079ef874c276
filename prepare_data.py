#!/usr/bin/env python3
"""Turn text into lines of SentencePiece pieces for pre-training. See `python prepare_data.py --help`."""

import argparse
import sys
from pathlib import Path

from DeBERTa.data.corpus import DownloadError, extract_sample, fetch_vocabulary, fetch_wikitext
from DeBERTa.data.files import get_cache_dir
from DeBERTa.data.prepare import MIN_SEQ_LENGTH, PreparedText, find_or_train_vocabulary, prepare
from DeBERTa.errors import DataError, DebertaError
from DeBERTa.log import set_up_logging

DESCRIPTION = """\
Turn text into lines of at most max_seq_length - 2 SentencePiece pieces, separated by single spaces.

Without --input: WikiText-103 with the DeBERTa-V3 vocabulary, all three splits, into the cache ($DEBERTA_CACHE, or
~/.cache/DeBERTa). What is there already and up to date is not made again."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", "--input", type=Path, help="a text file in UTF-8, also .gz or .xz")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file to write for --input; with --corpus, the folder"
    )
    parser.add_argument(
        "--corpus",
        choices=("wikitext-103", "sample"),
        help="what to prepare without --input (default: wikitext-103)",
    )
    parser.add_argument(
        "--wikitext", type=Path, metavar="ZIP", help="the WikiText-103 archive, fetched by hand"
    )
    parser.add_argument(
        "--max_seq_length", type=int, default=512, help="tokens a line, [CLS] and [SEP] included (512)"
    )
    parser.add_argument(
        "--vocab_path", type=Path, help="a SentencePiece model (default: the DeBERTa-V3 vocabulary)"
    )
    parser.add_argument(
        "--train_vocab",
        type=int,
        metavar="SIZE",
        help="train a vocabulary of SIZE pieces on the text (its training split) and write it to --vocab_path "
        "(default: spm.model beside --output, or in the corpus' cache folder)",
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="invalid UTF-8: an error that says where (strict, the default), or U+FFFD for every bad byte (replace)",
    )
    parser.add_argument(
        "--workers", type=int, help="processes that encode (default: one for each usable core)"
    )
    arguments = parser.parse_args(argv)
    if arguments.input is None and arguments.output is not None and arguments.corpus is None:
        parser.error("--output needs --input, or --corpus")
    if arguments.input is not None and arguments.output is None:
        parser.error("--input needs --output")
    if arguments.input is not None and arguments.corpus is not None:
        parser.error("--input and --corpus exclude each other")
    if arguments.wikitext is not None and (arguments.input is not None or arguments.corpus == "sample"):
        parser.error("--wikitext is for the corpus wikitext-103")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error("--workers must be at least 1")
    if arguments.max_seq_length < MIN_SEQ_LENGTH:
        parser.error(f"--max_seq_length must be at least {MIN_SEQ_LENGTH}")
    arguments.corpus = arguments.corpus or "wikitext-103"
    return arguments


def find_texts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Input texts by name of the split."""
    if arguments.input is not None:
        if not arguments.input.is_file():
            raise DataError(f"There is no text file {arguments.input}.")
        return {arguments.output.name: arguments.input}
    return extract_sample() if arguments.corpus == "sample" else fetch_wikitext(arguments.wikitext)


def find_vocabulary(arguments: argparse.Namespace, texts: dict[str, Path]) -> Path:
    if arguments.train_vocab is None:
        return arguments.vocab_path or fetch_vocabulary()
    beside = arguments.output.parent if arguments.input is not None else get_cache_dir() / arguments.corpus
    path = arguments.vocab_path or beside / "spm.model"
    return find_or_train_vocabulary(next(iter(texts.values())), arguments.train_vocab, path, arguments.errors)


def find_all(arguments: argparse.Namespace) -> tuple[dict[str, Path], Path]:
    """Texts and vocabulary. Without a network, one error says everything that has to be fetched by hand."""
    try:
        texts = find_texts(arguments)
    except DownloadError as error:
        if arguments.train_vocab is not None:
            raise
        try:
            find_vocabulary(arguments, {})
        except DownloadError as second:
            raise DownloadError(f"{error}\n{second}") from second
        raise
    return texts, find_vocabulary(arguments, texts)


def describe(prepared: PreparedText) -> str:
    megabytes = prepared.input_bytes / 1e6
    speed = "up to date" if prepared.seconds is None else f"{megabytes / prepared.seconds:.1f} MB/s"
    return f"{prepared.output}: {prepared.lines:,} lines, {prepared.num_tokens:,} tokens, {megabytes:.1f} MB, {speed}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 with a sentence on stderr if it cannot be done, 2 for wrong flags, 130 if interrupted."""
    arguments = parse_arguments(argv)
    set_up_logging()
    try:
        texts, vocabulary = find_all(arguments)
        folder = arguments.output or get_cache_dir() / arguments.corpus / str(arguments.max_seq_length)
        results = []
        for split, text in texts.items():
            output = arguments.output if arguments.input is not None else folder / f"{split}.txt"
            results.append(
                prepare(
                    text,
                    output,
                    vocabulary,
                    arguments.max_seq_length,
                    arguments.errors,
                    arguments.workers,
                    label=f"preparing {split}",
                )
            )
    except DebertaError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"prepare_data.py: {error.filename}: {reason}." if error.filename else reason, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; run it again to finish.", file=sys.stderr)
        return 130
    for result in results:
        print(describe(result))
    print(f"vocabulary: {vocabulary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
