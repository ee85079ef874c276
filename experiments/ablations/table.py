"""Print the ablations as Markdown tables; with --png, plot their curves.

    python experiments/ablations/table.py --png docs/ablations.png

Figures are means over seeds with 95 % confidence intervals (Student's t); minutes are medians. Runs of other
compute are in tables of their own, those of other model configs in columns of their own.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from DeBERTa.command import run_command, write_output
from DeBERTa.errors import ConfigError, DataError
from DeBERTa.files import open_atomic, read_file
from DeBERTa.flags import FlagParser

# Quantiles of Student's t at 97.5 % by degrees of freedom.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093,
    20: 2.086,
}  # fmt: skip
MORE_SEEDS = 2.080  # of 21, and a little too large above
Column = tuple[str, str, str]  # title, section of a result, name in it
RTD: tuple[Column, ...] = (
    ("generator loss", "final", "generator_loss"),
    ("discriminator loss", "final", "discriminator_loss"),
    ("ROC AUC", "final", "discriminator_auc"),
    ("rarity AUC", "final", "discriminator_rarity_auc"),
    ("tags", "probe", "discriminator_tag_accuracy"),
    ("tags, random weights", "probe", "discriminator_random_tag_accuracy"),
    ("pairs", "probe", "discriminator_pair_accuracy"),
    ("generator's tags", "probe", "generator_tag_accuracy"),
    ("generator's pairs", "probe", "generator_pair_accuracy"),
    ("cosine of the tables", "cosines", "between"),
    ("within generator's", "cosines", "generator"),
    ("within discriminator's", "cosines", "discriminator"),
)
MLM: tuple[Column, ...] = (
    ("loss", "final", "loss"),
    ("accuracy", "final", "accuracy"),
    ("tags", "probe", "model_tag_accuracy"),
    ("pairs", "probe", "model_pair_accuracy"),
    ("tags, random weights", "probe", "model_random_tag_accuracy"),
    ("tags, most frequent", "probe", "model_word_tag_accuracy"),
)
CURVES = {
    "generator_loss": "generator loss",
    "discriminator_loss": "discriminator loss",
    "loss": "MLM loss",
    "discriminator_auc": "ROC AUC",
}
Result = dict[str, Any]
SHOWN = ("steps", "commit")  # which should be the same in all runs of a column
KEYS = {"arm", "seed", "flops", "model_sha256", "steps", "final", "probe", "cosines", "curve"}


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(print_tables)


def print_tables() -> None:
    """Print the tables."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--png", type=Path, metavar="FILE", help="needs matplotlib")
    flags = parser.parse_args()
    results = read_results(flags.results)
    write_output("\n\n".join(format_tables(results)) + "\n")
    if flags.png:
        draw_curves(results, flags.png)


def read_results(path: Path) -> list[Result]:
    """Return the results of the runs that are finished.

    Raises `DataError` for a file that cannot be read, and for a line that is not the result of a run, such as
    one that a crash truncated.
    """
    try:
        text = read_file(path).decode(errors="replace")
    except OSError as error:
        message = f"{path}: {error.strerror}; give a file that experiments/ablations/run.py wrote"
        raise DataError(message) from None
    results = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            results.append(json.loads(line))
            is_result = results[-1].keys() >= KEYS
        except (ValueError, AttributeError):
            is_result = False
        if not is_result:
            raise DataError(
                f"line {number} of {path} is not a result of experiments/ablations/run.py: remove the line, "
                "and start that command again"
            )
    return results


def format_tables(results: list[Result]) -> list[str]:
    """Return a table for each kind of model and each amount of compute."""
    tables = []
    for flops in sorted({result["flops"] for result in results}):
        same = [result for result in results if result["flops"] == flops]
        tables.append(f"Each run: {flops:.3g} FLOPs; {', '.join(sorted({r['device'] for r in same}))}.")
        for name, columns in (("generator_loss", RTD), ("loss", MLM)):
            arms: dict[tuple[str, str], list[Result]] = defaultdict(list)
            for result in same:
                if name in result["final"]:
                    arms[result["arm"], result["model_sha256"]].append(result)
            if arms:
                tables.append(format_table(arms, columns))
    return tables


def format_table(arms: dict[tuple[str, str], list[Result]], columns: tuple[Column, ...]) -> str:
    """Return a Markdown table with a column per arm and model config."""
    cells = [
        [arm, "---", str(len(results)), *(list_values(results, name) for name in SHOWN)]
        + [f"{median(result['wall_seconds'] for result in results) / 60:.0f}"]
        + [format_interval([r[part][name] for r in results if name in r[part]]) for _, part, name in columns]
        for (arm, _), results in arms.items()
    ]
    titles = ["", "---", "seeds", *SHOWN, "minutes", *(title for title, _, _ in columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(titles, *cells, strict=True))


def list_values(results: list[Result], name: str) -> str:
    """Return the different values of the runs, shortened.

    There should be one.
    """
    return ", ".join(sorted({str(result[name])[:8] for result in results}))


def format_interval(values: list[float]) -> str:
    """Return mean and half the width of the 95 % confidence interval.

    Of one seed, or of equal values, it is the value alone.
    """
    if len(set(values)) < 2:
        return f"{values[0]:.3f}" if values else "–"
    half = STUDENT.get(len(values) - 1, MORE_SEEDS) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def draw_curves(results: list[Result], path: Path) -> None:
    """Plot the curves by FLOPs, a color per arm, a line per seed."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        raise ConfigError("--png: the package matplotlib is missing; pip install matplotlib") from None
    arms = list(dict.fromkeys(result["arm"] for result in results))
    figure = Figure(figsize=(18, 4.5), layout="constrained")
    for number, (name, title) in enumerate(CURVES.items(), start=1):
        axes = figure.add_subplot(1, len(CURVES), number, title=title, xlabel="FLOPs")
        for result in results:
            points = [(row["step"] / result["steps"] * result["flops"], row[name])
                      for row in result["curve"] if name in row]  # fmt: skip
            if points:
                color = f"C{arms.index(result['arm'])}"
                axes.plot(*zip(*points, strict=True), color=color, label=result["arm"], lw=1)
        labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one per arm
        axes.legend(labels.values(), labels.keys(), fontsize=8)
    with open_atomic(path.resolve()) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(main())
