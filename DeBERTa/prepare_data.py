"""Prepare text for pre-training: `python prepare_data.py --help`."""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from DeBERTa import command
from DeBERTa.config import Bounds
from DeBERTa.data.corpus import DownloadError, extract_sample, fetch_vocabulary, fetch_wikitext
from DeBERTa.data.encode import Recipe
from DeBERTa.data.prepare import MIN_SEQ_LENGTH, PreparedText, is_prepared, prepare_outputs
from DeBERTa.data.sources import Reading, find_sources
from DeBERTa.data.token_store import PART, get_part_name
from DeBERTa.data.vocabulary import check_text, find_or_train_vocabulary
from DeBERTa.errors import DataError
from DeBERTa.files import get_cache_dir
from DeBERTa.flags import FlagParser, build_config, read_flags
from DeBERTa.log import secure_console, set_up_logging
from DeBERTa.presets import CORPORA, list_preparation

BOUNDS = {"workers": Bounds(1, 1024), "train_vocab": Bounds(1), "max_seq_length": Bounds(MIN_SEQ_LENGTH)}
DESCRIPTION = """\
Turn text into lines of at most max_seq_length - 2 SentencePiece pieces, separated by single spaces.

Without --input: WikiText-103 with the DeBERTa-V3 vocabulary, all three splits, into the cache
($DEBERTA_CACHE, or ~/.cache/DeBERTa). What is there already and up to date is not prepared again.

With --preset NAME: what `python -m DeBERTa.train --preset NAME` with the same flags trains on."""

HELP = {
    "--input": "files, directories, quoted patterns, or - for standard input: text in UTF-8, JSON lines or "
    "Parquet, also compressed with gzip, xz, bzip2 or Zstandard, whatever their names",
    "--output": "the file to write for --input; the directory with --corpus or --valid_fraction",
    "--column": "the field of JSON lines or column of Parquet with the text (default: text); '' reads JSON "
    "lines as plain text",
    "--valid_fraction": "the share of documents that go to valid.txt, by a hash of their text (default: 0)",
    "--test_fraction": "the share of documents that go to test.txt, by a hash of their text (default: 0)",
    "--shard": "prepare part I of N, from 0: every N-th input file, into a directory named as --output says",
    "--check": "write nothing; report how the vocabulary fits the text",
    "--corpus": "what to prepare without --input (default: wikitext-103)",
    "--preset": "prepare what this preset trains on; other flags: the trainer's",
    "--wikitext": "a downloaded archive of WikiText-103",
    "--max_seq_length": "length of a sequence, [CLS] and [SEP] included (tokens; default: 512)",
    "--vocab_path": "a SentencePiece model (default: the DeBERTa-V3 vocabulary)",
    "--train_vocab": "train a vocabulary of N pieces on all documents of --input (of a corpus: the training "
    "split) and write it to --vocab_path (default: spm.model in the directory of --output, or of the corpus "
    "in the cache)",
    "--character_coverage": "for --train_vocab: the share of the text's characters that the vocabulary must "
    "cover, from 0.98 (default: 1; 0.9995 leaves out rare characters of large scripts, such as Chinese)",
    "--errors": "invalid UTF-8: an error that says where (strict, the default), or U+FFFD in place of it",
    "--workers": "encoding processes (default: one per usable core)",
}

logger = logging.getLogger("DeBERTa.prepare_data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    interrupted = "interrupted; run the same command again to finish"
    return command.run_command(lambda: prepare_all(sys.argv[1:] if argv is None else argv), interrupted)


def prepare_all(argv: Sequence[str]) -> None:
    """Prepare the texts that the flags name, or check them, and log the results."""
    if any(argument.partition("=")[0] == "--preset" for argument in argv):
        argv = read_preset_flags(argv)
        if not argv:
            return
    arguments = parse_arguments(argv)
    texts, vocabulary = find_inputs(arguments)
    recipe = Recipe(vocabulary, get_reading(arguments), tuple(get_ranges(arguments).values()))
    if arguments.check:
        for sources in texts.values():
            logger.info("%s", check_text(sources, recipe))
    else:
        prepared = prepare_texts(arguments, texts, recipe)
        for result in prepared:
            logger.info("%s", describe(result))
    logger.info("vocabulary: %s", vocabulary)


def prepare_texts(
    arguments: argparse.Namespace, texts: dict[str, list[Path]], recipe: Recipe
) -> list[PreparedText]:
    """Prepare the texts into the outputs that the flags name."""
    length, workers, shard = arguments.max_seq_length, arguments.workers, arguments.shard
    if arguments.input is None:
        folder = arguments.output or get_cache_dir() / arguments.corpus / str(length)
        return [
            prepared
            for split, sources in texts.items()
            for prepared in prepare_outputs(sources, [folder / f"{split}.txt"], recipe, length, workers)
        ]
    (sources,) = texts.values()
    outputs = list_outputs(arguments)
    if shard is not None:
        number, count = shard
        if count > len(sources):
            raise DataError(
                f"cannot make {count} parts of {len(sources)} input files: a file is in one part; "
                "give more files, or fewer parts with --shard"
            )
        sources = sources[number::count]
        outputs = [output / get_part_name(number, count) for output in outputs]
    return prepare_outputs(sources, outputs, recipe, length, workers, is_part=shard is not None)


def list_outputs(arguments: argparse.Namespace) -> list[Path]:
    """Return what is written for --input: files, or with --shard directories."""
    folder, ranges = arguments.output, get_ranges(arguments)
    return [folder / f"{split}.txt" for split in ("train", *ranges)] if ranges else [folder]


def find_input_files(arguments: argparse.Namespace) -> list[Path]:
    """Return the files that --input names, without what this command wrote below them.

    An output is what has this command's token ids, which name its size and time. Raw text of the same name
    remains an input, so that it is not overwritten. Parts can be other nodes', and without token ids yet.
    Raises `DataError` if parts were to be written to a directory that holds input.
    """
    if arguments.output is None:
        return find_sources(arguments.input)
    outputs = [output.resolve() for output in list_outputs(arguments)]
    vocabulary = (arguments.vocab_path or outputs[0].parent / "spm.model").resolve()

    def is_output(path: Path) -> bool:
        path = path.with_name(path.name.removesuffix(".part"))
        if path in (vocabulary, vocabulary.with_name(f"{vocabulary.name}.json")):
            return True
        text = path.with_name(path.name.removesuffix(".ids"))
        if arguments.shard:
            return text.parent == outputs[0] and PART.fullmatch(text.name) is not None
        return text in outputs and (text != path or is_prepared(text))

    sources = find_sources(arguments.input, is_output)
    if arguments.shard and any(source.resolve().parent == outputs[0] for source in sources):
        what = f"cannot write parts to {arguments.output}: it also holds input"
        raise DataError(f"{what}; give a directory of its own as --output")
    return sources


def get_ranges(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return the ranges of hashes of documents that go to valid and test.

    They begin at opposite ends, so that a change of one fraction moves no document of the other split.
    """
    valid, test = arguments.valid_fraction, arguments.test_fraction
    ranges = {"valid": (0.0, valid), "test": (1 - test, 1.0)}
    return {split: (start, end) for split, (start, end) in ranges.items() if start < end}


def get_reading(arguments: argparse.Namespace) -> Reading:
    """Return how the input is read."""
    has_documents = bool(get_ranges(arguments)) or arguments.check
    return Reading(arguments.column, arguments.errors, has_documents)


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
    parser = build_parser()
    arguments = argparse.Namespace(**parser.read(argv))
    inputs, output, corpus = arguments.input, arguments.output, arguments.corpus
    fractions = (arguments.valid_fraction, arguments.test_fraction)
    problems = {
        "--output needs --input, or --corpus": output and not inputs and not corpus,
        "--input needs --output, or --check": inputs and not output and not arguments.check,
        "--input and --corpus exclude each other": inputs and corpus,
        "--check and --train_vocab exclude each other": arguments.check and arguments.train_vocab is not None,
        "--check is of all the text: omit --shard": arguments.check and arguments.shard,
        "--wikitext is for --corpus wikitext-103": arguments.wikitext and (inputs or corpus == "sample"),
        "--shard and fractions are for --input": not inputs and (arguments.shard or sum(fractions)),
        "fractions must be at least 0, and below 1 together": not 0 <= min(fractions) <= sum(fractions) < 1,
        "--character_coverage must be from 0.98 to 1": not 0.98 <= arguments.character_coverage <= 1,
    }
    for name, bounds in BOUNDS.items():
        value = getattr(arguments, name)
        problems[f"--{name} must be {bounds}, not {value}"] = value is not None and value not in bounds
    for message, is_wrong in problems.items():
        if is_wrong:
            parser.error(message)
    arguments.corpus = arguments.corpus or "wikitext-103"
    return arguments


def build_parser() -> FlagParser:
    """Return the parser of the flags."""
    parser = FlagParser(
        prog="prepare_data.py",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, *short: str, **options: Any) -> None:
        parser.add_argument(*short, name, help=HELP[name], **options)

    add("--input", "-i", type=Path, nargs="+", metavar="PATH")
    add("--output", "-o", type=Path)
    add("--column", default="text", metavar="NAME")
    add("--valid_fraction", type=float, default=0.0, metavar="X")
    add("--test_fraction", type=float, default=0.0, metavar="X")
    add("--shard", type=parse_shard, metavar="I/N")
    add("--check", action="store_true")
    add("--corpus", choices=CORPORA)
    add("--preset", metavar="NAME")
    add("--wikitext", type=Path, metavar="ZIP")
    add("--max_seq_length", type=int, default=512, metavar="N")
    add("--vocab_path", type=Path)
    add("--train_vocab", type=int, metavar="N")
    add("--character_coverage", type=float, default=1.0, metavar="X")
    add("--errors", choices=("strict", "replace"), default="strict")
    add("--workers", type=int, metavar="N")
    return parser


def parse_shard(text: str) -> tuple[int, int]:
    """Return number and count of `I/N`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, not {text!r}")
    return int(number), int(count)


def find_inputs(arguments: argparse.Namespace) -> tuple[dict[str, list[Path]], Path]:
    """Return the files of text by name of the split, and the vocabulary.

    What is missing is fetched or trained. Raises `DataError` if a text is missing, and one `DownloadError`
    that names all missing downloads.
    """
    try:
        if arguments.input is not None:
            texts = {"input": find_input_files(arguments)}
        else:
            is_sample = arguments.corpus == "sample"
            splits = extract_sample() if is_sample else fetch_wikitext(arguments.wikitext)
            texts = {split: [text] for split, text in splits.items()}
    except DownloadError as error:
        if arguments.train_vocab is None:
            try:
                find_vocabulary(arguments, {})
            except DownloadError as second:
                raise DownloadError(f"{error}\n{second}") from second
        raise
    return texts, find_vocabulary(arguments, texts)


def find_vocabulary(arguments: argparse.Namespace, texts: dict[str, list[Path]]) -> Path:
    """Return the vocabulary; fetch or train it if needed."""
    if arguments.train_vocab is None:
        return arguments.vocab_path or fetch_vocabulary()
    folder = get_cache_dir() / arguments.corpus
    if arguments.input is not None:
        folder = arguments.output if get_ranges(arguments) else arguments.output.parent
    path, coverage = arguments.vocab_path or folder / "spm.model", arguments.character_coverage
    sources = next(iter(texts.values()))
    return find_or_train_vocabulary(sources, arguments.train_vocab, path, get_reading(arguments), coverage)


def describe(prepared: PreparedText) -> str:
    """Return one line about a prepared text."""
    meta = prepared.meta
    megabytes = (meta.recipe or {})["input_bytes"] / 1e6
    speed = "up to date" if prepared.seconds is None else f"{megabytes / prepared.seconds:.1f} MB/s"
    counts = f"{meta.lines:,} lines, {meta.num_tokens:,} tokens, {megabytes:.1f} MB"
    return f"{prepared.output}: {counts}, {speed}"


def run_command() -> NoReturn:
    """Run the console command, and exit with its status."""
    secure_console()
    sys.exit(main())


if __name__ == "__main__":
    run_command()
