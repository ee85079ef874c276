"""Fine-tune an exported model on labeled text, and a baseline without word order.

    pip install transformers scikit-learn
    python experiments/finetune/finetune.py output/TAG/discriminator --train train.tsv --test test.tsv
    python experiments/finetune/finetune.py MODEL --glue cola     # needs datasets and a network
    python experiments/finetune/finetune.py MODEL --movies vaderSentiment-3.3.1.tar.gz

Files are TSV with a header, or JSON lines. `--movies` takes the source archive of vaderSentiment 3.3.1, which
has 10,604 rated sentences of movie reviews: docs/evaluation.md. Figures are those of the test rows after the
last epoch; nothing is chosen by them.
"""

import argparse
import csv
import io
import json
import random
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from DeBERTa.command import run_command, write_output
from DeBERTa.errors import ConfigError, DataError, DebertaError, NonFiniteError
from DeBERTa.files import raise_data_errors, raise_storage_errors
from DeBERTa.flags import FlagParser

GLUE = {  # text columns, and the test part: the labels of "test" are not public
    "cola": (["sentence"], "validation"),
    "sst2": (["sentence"], "validation"),
    "mrpc": (["sentence1", "sentence2"], "validation"),
    "qqp": (["question1", "question2"], "validation"),
    "stsb": (["sentence1", "sentence2"], "validation"),
    "mnli": (["premise", "hypothesis"], "validation_matched"),
    "qnli": (["question", "sentence"], "validation"),
    "rte": (["sentence1", "sentence2"], "validation"),
    "wnli": (["sentence1", "sentence2"], "validation"),
}
MOVIES = ("additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
TEST_SHARE = 0.2  # of the movie sentences
WARMUP = 0.1  # share of the steps
MOST_FEATURES = 20_000  # features of the baseline
PENALTIES = [10.0**power for power in range(-3, 4)]
FOLDS = 5  # of the cross-validation; without, scikit-learn decomposes a dense matrix of all rows


class Row(NamedTuple):
    """One or two texts, and their label or value."""

    texts: tuple[str, ...]
    label: str


class Task(NamedTuple):
    """The labeled rows; `labels` is empty for regression."""

    train: list[Row]
    test: list[Row]
    labels: list[str]

    def encode_targets(self, rows: list[Row]) -> list[float]:
        """Return class numbers, or values."""
        return [self.labels.index(row.label) if self.labels else float(row.label) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: run(parse_arguments(argv)))


def run(flags: argparse.Namespace) -> None:
    """Compare the scores.

    Raises `ConfigError` where a package is missing, and for what transformers and its optimizer refuse.
    """
    try:
        import_module("transformers")
        import_module("sklearn")
        compare_scores(flags)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(str(error.name), error.name)
        raise ConfigError(f"the package {package} is missing: pip install {package}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DebertaError) or (isinstance(error, OSError) and error.filename):
            raise
        raise ConfigError(str(error)) from error


def compare_scores(flags: argparse.Namespace) -> None:
    """Print a line per seed, mean and spread, and the baseline."""
    task = open_task(flags)
    kind = f"{len(task.labels)} classes" if task.labels else "regression"
    write_output(f"{len(task.train):,} training rows, {len(task.test):,} test rows, {kind}\n")
    results = []
    for seed in flags.seeds:
        results.append(score(task, fine_tune(task, flags, seed)))
        write_output(f"seed {seed}: {format_scores(results[-1])}\n")
    scores = {name: [result[name] for result in results] for name in results[0]}
    if len(results) > 1:
        spread = (f"{name} {mean(values):.4f} ± {stdev(values):.4f}" for name, values in scores.items())
        write_output(f"mean ± standard deviation over {len(results)} seeds: {'  '.join(spread)}\n")
    baseline = score(task, fit_words(task))
    write_output(f"words only: {format_scores(baseline)}\n")
    if flags.output:
        values = {"command": sys.argv, "seeds": flags.seeds, "scores": scores, "words_only": baseline}
        with raise_storage_errors(flags.output):
            flags.output.write_text(json.dumps(values, indent=2) + "\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory, such as output/TAG/discriminator")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", type=Path, metavar="FILE", help="training rows; needs --test")
    source.add_argument("--glue", choices=GLUE)
    source.add_argument("--movies", type=Path, metavar="ARCHIVE")
    parser.add_argument("--test", type=Path, metavar="FILE")
    parser.add_argument(
        "--text", nargs="+", default=["text"], metavar="COLUMN", help="one or two (default: text)"
    )
    parser.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    parser.add_argument("--task", choices=("classification", "regression"), default="classification")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    parser.add_argument("--epochs", type=parse_count, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--learning_rate", type=float, default=1e-4, metavar="X", help="default: 1e-4; 2e-5 for base"
    )
    parser.add_argument("--batch_size", type=parse_count, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--max_length", type=parse_count, default=128, metavar="N", help="in tokens (default: 128)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all scores as JSON, too")
    flags = parser.parse_args(argv)
    if bool(flags.train) != bool(flags.test):
        parser.error("--train and --test belong together")
    if len(flags.text) > 2:
        parser.error(f"--text: one or two columns, not {len(flags.text)}")
    if flags.output and not flags.output.parent.is_dir():
        parser.error(f"--output: there is no directory {flags.output.parent}")
    # A shorter path may be the name of a model on the hub, too.
    if flags.model.count("/") > 1 and not Path(flags.model).is_dir():
        parser.error(f"there is no model directory {flags.model}")
    if (Path(flags.model) / "checkpoints").is_dir():
        parser.error(
            f"{flags.model} is the directory of a run; give that of its model, such as its discriminator"
        )
    if Path(flags.model).is_dir() and not (Path(flags.model) / "config.json").is_file():
        parser.error(f"{flags.model} holds no model, whose directory has a config.json")
    return flags


def parse_count(text: str) -> int:
    """Return a number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, not {text!r}")
    return int(text)


def open_task(flags: argparse.Namespace) -> Task:
    """Read the rows."""
    is_regression = flags.task == "regression" or flags.glue == "stsb"
    if flags.glue:
        train, test = read_glue(flags.glue)
    elif flags.movies:
        train, test = read_movies(flags.movies, is_regression)
    else:
        train, test = (read_rows(path, flags.text, flags.label) for path in (flags.train, flags.test))
    labels = [] if is_regression else sorted({row.label for row in train})
    if unknown := {row.label for row in test} - set(labels) if labels else set():
        raise DataError(
            f"labels {sorted(unknown)[:5]} of the test rows are not among those of the training rows"
        )
    if is_regression and (wrong := [row.label for row in train + test if not is_number(row.label)]):
        raise DataError(f"{wrong[0]!r} is no number to predict; omit --task regression, or give --label")
    if len(labels) == 1:
        raise DataError(f"all training rows are labeled {labels[0]}; give two classes, or --task regression")
    if not any(re.search(r"\w\w", text) for row in train for text in row.texts):
        raise DataError("the training rows have no word of two letters; give texts, or another --text")
    if max(Counter(row.label for row in train).values() if labels else [len(train)]) < 2:
        raise DataError("the baseline needs two training rows, of the same class; give more rows")
    return Task(train, test, labels)


def is_number(text: str) -> bool:
    """Return whether a text stands for a finite number."""
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def read_rows(path: Path, texts: list[str], label: str) -> list[Row]:
    """Read JSON lines, or TSV with a header."""
    try:
        with raise_data_errors(path), path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".jsonl", ".json"):
                values = [dict(json.loads(line)) for line in file if line.strip()]
            else:
                values = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: neither TSV nor JSON lines in UTF-8 ({error})") from error
    if not values:
        raise DataError(f"{path}: no rows; TSV has a header and a line per row")
    for number, value in enumerate(values, start=1):
        if missing := [name for name in (*texts, label) if value.get(name) is None]:
            known = ", ".join(map(str, value))
            raise DataError(
                f"{path}: row {number} has no {missing[0]} (but {known}); give --text and --label"
            )
    return [Row(tuple(str(value[name]) for name in texts), str(value[label])) for value in values]


def read_glue(name: str) -> tuple[list[Row], list[Row]]:
    """Download a GLUE task."""
    columns, test = GLUE[name]
    data = import_module("datasets").load_dataset("nyu-mll/glue", name)
    parts = (data["train"], data[test])
    return tuple(  # type: ignore[return-value]
        [Row(tuple(row[column] for column in columns), str(row["label"])) for row in part] for part in parts
    )


def read_movies(archive: Path, is_regression: bool) -> tuple[list[Row], list[Row]]:
    """Read movie sentences of vaderSentiment: mean rating, or whether it is above 0.

    A hash of its text decides whether a sentence is in the test part, so that no text is in both.
    """
    with raise_data_errors(archive), archive.open("rb") as file:
        inner = read_member(file, MOVIES[0])
    lines = read_member(io.BytesIO(inner), MOVIES[1]).decode("utf-8", "replace").splitlines()
    parts: tuple[list[Row], list[Row]] = ([], [])
    for _, rating, text in (line.split("\t", 2) for line in lines):
        is_test = int(sha256(text.strip().lower().encode()).hexdigest()[:8], 16) < TEST_SHARE * 2**32
        if is_regression or float(rating):
            parts[is_test].append(Row((text,), rating if is_regression else str(float(rating) > 0)))
    return parts


def read_member(file: io.BufferedIOBase, name: str) -> bytes:
    """Return the file of an archive whose path ends with `name`."""
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                if member.name.endswith(name) and (content := archive.extractfile(member)):
                    return content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"--movies: not a complete archive ({error}); fetch it again") from error
    raise DataError(f"--movies: no {name} in the archive; give vaderSentiment-3.3.1.tar.gz")


def fine_tune(task: Task, flags: argparse.Namespace, seed: int) -> list[float]:
    """Train for some epochs, and return the predictions for the test rows."""
    transformers = import_module("transformers")
    transformers.set_seed(seed)
    transformers.logging.set_verbosity_error()  # the new head has no weights; that is known
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        flags.model, num_labels=len(task.labels) or 1, problem_type=None if task.labels else "regression"
    ).float()  # files may be in half precision
    model.to(device)

    max_length = min(flags.max_length, tokenizer.model_max_length)

    def encode(rows: list[Row]) -> dict[str, torch.Tensor]:
        texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
        return tokenizer(
            *texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)

    steps = flags.epochs * -(-len(task.train) // flags.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.learning_rate)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    order = random.Random(seed)
    for _ in range(flags.epochs):
        model.train()
        rows = order.sample(task.train, len(task.train))
        for start in range(0, len(rows), flags.batch_size):
            batch = rows[start : start + flags.batch_size]
            targets = torch.tensor(task.encode_targets(batch), device=device)
            loss = model(**encode(batch), labels=targets.long() if task.labels else targets).loss
            if not loss.isfinite():
                raise NonFiniteError("the loss is not finite: training diverged; lower --learning_rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    predictions: list[float] = []
    with torch.no_grad():
        for start in range(0, len(task.test), flags.batch_size):
            logits = model(**encode(task.test[start : start + flags.batch_size])).logits
            if not logits.isfinite().all():
                raise NonFiniteError("scores are not finite: training diverged; lower --learning_rate")
            predictions += (logits.argmax(1) if task.labels else logits[:, 0]).tolist()
    return predictions


def fit_words(task: Task) -> list[float]:
    """Return the predictions of a linear model of words and pairs of words.

    It is not pretrained. Its penalty is chosen by cross-validation on the training rows.
    """
    text, linear = import_module("sklearn.feature_extraction.text"), import_module("sklearn.linear_model")
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), max_features=MOST_FEATURES, sublinear_tf=True)
    train, test = ([" ".join(row.texts) for row in rows] for rows in (task.train, task.test))
    features = vectorizer.fit_transform(train)
    targets = task.encode_targets(task.train)
    folds = min(FOLDS, max(Counter(targets).values()) if task.labels else len(targets))
    model = (linear.RidgeClassifierCV if task.labels else linear.RidgeCV)(alphas=PENALTIES, cv=folds)
    model.fit(features, targets)
    return model.predict(vectorizer.transform(test)).tolist()


def score(task: Task, predictions: list[float]) -> dict[str, float]:
    """Return accuracy, F1 and Matthews correlation, or rank and linear correlation."""
    targets = task.encode_targets(task.test)
    if not task.labels:
        stats = import_module("scipy.stats")
        return {
            "spearman": float(stats.spearmanr(targets, predictions).statistic),
            "pearson": float(stats.pearsonr(targets, predictions).statistic),
        }
    metrics = import_module("sklearn.metrics")
    average = "binary" if len(task.labels) == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(targets, predictions)),
        "f1": float(metrics.f1_score(targets, predictions, average=average)),
        "matthews": float(metrics.matthews_corrcoef(targets, predictions)),
    }


def format_scores(scores: dict[str, float]) -> str:
    """Return the scores on one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())


if __name__ == "__main__":
    sys.exit(main())
