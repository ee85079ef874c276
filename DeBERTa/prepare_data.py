"""Prepare text for pre-training: `python prepare_data.py --help`."""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from DeBERTa.data.corpus import DownloadError, extract_sample, fetch_vocabulary, fetch_wikitext
from DeBERTa.data.files import get_cache_dir
from DeBERTa.data.prepare import MIN_SEQ_LENGTH, PreparedText, prepare
from DeBERTa.data.vocabulary import find_or_train_vocabulary
from DeBERTa.errors import DataError, DebertaError, describe_os_error
from DeBERTa.flags import FlagParser, build_config, read_flags
from DeBERTa.log import secure_console, set_up_logging
from DeBERTa.presets import CORPORA, list_preparation

DESCRIPTION = """\
Turn text into lines of at most max_seq_length - 2 SentencePiece pieces, separated by single spaces.

Without --input: WikiText-103 with the DeBERTa-V3 vocabulary, all three splits, into the cache
($DEBERTA_CACHE, or ~/.cache/DeBERTa). What is there already and up to date is not prepared again.

With --preset NAME: what `python -m DeBERTa.train --preset NAME` with the same flags trains on."""

logger = logging.getLogger("DeBERTa.prepare_data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0 on success, 1 after an error, 2 for wrong flags, 130 after an interrupt.
    """
    set_up_logging()
    try:
        prepare_all(sys.argv[1:] if argv is None else argv)
    except DebertaError as error:
        logger.error("%s", error)
        return error.exit_status
    except OSError as error:
        logger.error("%s", describe_os_error(error))
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again to finish")
        return 130
    return 0


def prepare_all(argv: Sequence[str]) -> None:
    """Prepare the texts that the flags name, and log the results."""
    if any(argument.partition("=")[0] == "--preset" for argument in argv):
        argv = read_preset_flags(argv)
        if not argv:
            return
    arguments = parse_arguments(argv)
    texts, vocabulary = find_all(arguments)
    folder = arguments.output or get_cache_dir() / arguments.corpus / str(arguments.max_seq_length)
    results = [
        prepare(
            text,
            arguments.output if arguments.input is not None else folder / f"{split}.txt",
            vocabulary,
            arguments.max_seq_length,
            arguments.errors,
            arguments.workers,
        )
        for split, text in texts.items()
    ]
    for result in results:
        logger.info("%s", describe(result))
    logger.info("vocabulary: %s", vocabulary)


def read_preset_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags of this command for the flags of the training command.

    The list is empty if there is nothing to prepare: with `--data_dir`, `--help` or `--version`.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            flags = read_flags(argv)
    except SystemExit:
        return []
    config = build_config(flags)
    config.validate()
    set_up_logging(config.log_level)
    return list_preparation(flags, config)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises `UsageError` for unknown flags, wrong values and invalid combinations.
    """
    parser = FlagParser(
        prog="prepare_data.py",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-i", "--input", type=Path, help="a text file in UTF-8, also .gz or .xz")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file to write for --input; with --corpus, the directory"
    )
    parser.add_argument(
        "--corpus", choices=CORPORA, help="what to prepare without --input (default: wikitext-103)"
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="prepare what this preset trains on; other flags: the trainer's",
    )
    parser.add_argument("--wikitext", type=Path, metavar="ZIP", help="a downloaded archive of WikiText-103")
    parser.add_argument(
        "--max_seq_length",
        type=int,
        default=512,
        metavar="N",
        help="length of a sequence, [CLS] and [SEP] included (tokens; default: 512)",
    )
    parser.add_argument(
        "--vocab_path", type=Path, help="a SentencePiece model (default: the DeBERTa-V3 vocabulary)"
    )
    parser.add_argument(
        "--train_vocab",
        type=int,
        metavar="N",
        help="train a vocabulary of N pieces on the text (its training split) and write it to --vocab_path "
        "(default: spm.model in the directory of --output, or of the corpus in the cache)",
    )
    parser.add_argument(
        "--character_coverage",
        type=float,
        default=1.0,
        metavar="X",
        help="for --train_vocab: the share of the text's characters that the vocabulary must cover, from "
        "0.98 (default: 1; 0.9995 leaves out rare characters of large scripts, such as Chinese)",
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="invalid UTF-8: an error that says where (strict, the default), or U+FFFD for each bad byte",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="encoding processes (default: one per usable core)"
    )
    arguments = argparse.Namespace(**parser.read(argv))
    has_input, has_output, corpus = arguments.input, arguments.output, arguments.corpus
    problems = {
        "--output needs --input, or --corpus": has_output and not has_input and not corpus,
        "--input needs --output": has_input and not has_output,
        "--input and --corpus exclude each other": has_input and corpus,
        "--wikitext is for --corpus wikitext-103": arguments.wikitext and (has_input or corpus == "sample"),
        "--workers must be at least 1": arguments.workers is not None and arguments.workers < 1,
        "--character_coverage must be from 0.98 to 1": not 0.98 <= arguments.character_coverage <= 1,
        f"--max_seq_length must be at least {MIN_SEQ_LENGTH}": arguments.max_seq_length < MIN_SEQ_LENGTH,
    }
    for message, is_wrong in problems.items():
        if is_wrong:
            parser.error(message)
    arguments.corpus = arguments.corpus or "wikitext-103"
    return arguments


def find_texts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the input texts by name of the split.

    Raises `DataError` if a text is missing or cannot be downloaded.
    """
    if arguments.input is not None:
        if not arguments.input.is_file():
            raise DataError(f"no text file {arguments.input}")
        return {arguments.output.name: arguments.input}
    return extract_sample() if arguments.corpus == "sample" else fetch_wikitext(arguments.wikitext)


def find_vocabulary(arguments: argparse.Namespace, texts: dict[str, Path]) -> Path:
    """Return the vocabulary; fetch or train it if needed."""
    if arguments.train_vocab is None:
        return arguments.vocab_path or fetch_vocabulary()
    folder = arguments.output.parent if arguments.input is not None else get_cache_dir() / arguments.corpus
    path = arguments.vocab_path or folder / "spm.model"
    return find_or_train_vocabulary(
        next(iter(texts.values())),
        arguments.train_vocab,
        path,
        arguments.errors,
        arguments.character_coverage,
    )


def find_all(arguments: argparse.Namespace) -> tuple[dict[str, Path], Path]:
    """Return the texts and the vocabulary.

    Raises one `DownloadError` that names all missing downloads.
    """
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
    """Return one line about a prepared text."""
    megabytes = prepared.input_bytes / 1e6
    speed = "up to date" if prepared.seconds is None else f"{megabytes / prepared.seconds:.1f} MB/s"
    counts = f"{prepared.lines:,} lines, {prepared.num_tokens:,} tokens, {megabytes:.1f} MB"
    return f"{prepared.output}: {counts}, {speed}"


def run_command() -> NoReturn:
    """Run the console command, and exit with its status."""
    secure_console()
    sys.exit(main())


if __name__ == "__main__":
    run_command()
