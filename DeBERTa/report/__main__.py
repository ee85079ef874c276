"""The command `python -m DeBERTa.report RUN [RUN ...]`."""

import argparse
import csv
import logging
import math
import sys
from pathlib import Path

import numpy as np

from DeBERTa.command import run_command
from DeBERTa.errors import ConfigError, DataError, DebertaError
from DeBERTa.files import open_atomic, raise_storage_errors
from DeBERTa.flags import FlagParser
from DeBERTa.report.charts import build_charts
from DeBERTa.report.health import NOTE, USUAL, Finding, examine
from DeBERTa.report.page import write_report
from DeBERTa.report.read import RunRecord, read_run
from DeBERTa.report.reference import compare_with_reference

logger = logging.getLogger("DeBERTa.report")  # as a command, __name__ is "__main__"


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(report)


def report() -> None:
    """Read the flags, and write what they name.

    Raises `DataError` for runs with values of other types.
    """
    parser = FlagParser(prog="python -m DeBERTa.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--html", type=Path, help="default: RUN/report.html; of several, comparison.html")
    parser.add_argument("--csv", type=Path, help="write all metrics of all runs to this file, too")
    parser.add_argument("--png", type=Path, help="write the charts to this file, too; needs matplotlib")
    reference = "compare tiny presets with the project's runs"
    parser.add_argument("--reference", action="store_true", help=reference)
    flags = parser.parse_args()
    try:
        write_all(flags)
    except DebertaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{', '.join(map(str, flags.runs))}: a file of the run was changed, a value in it is not what a "
            f"run writes ({error}); restore its .json and .jsonl files"
        ) from error


def write_all(flags: argparse.Namespace) -> None:
    """Write the page, and table and charts if wanted; log what is not usual."""
    runs = [read_run(path) for path in flags.runs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    page = flags.html or (flags.runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    for path in (path for path in (page, flags.csv, flags.png) if path and path.exists()):
        if any(path.samefile(file) for run in flags.runs for file in run.glob("*.json*")):
            raise ConfigError(f"cannot write {path}: it is a file of the run; give another name")
    write_report(runs, page.resolve())  # a link stays, and what it points to is replaced
    nothing = Finding(NOTE, "the reference", "has no evaluation at a step of this run")
    for run in runs if flags.reference else ():
        for finding in compare_with_reference(run, recorded=flags.csv) or [nothing]:
            logger.info("%s: %s: %s %s", run.name, *finding)
    if flags.csv:
        write_csv(runs, flags.csv)
    if flags.png:
        draw_png(runs, flags.png)
    for run in runs:
        for finding in examine(run):
            if finding.level != USUAL:
                logger.info("%s: %s: %s. %s", run.name, *finding)
    logger.info("wrote %s", page)


def write_csv(runs: list[RunRecord], path: Path) -> None:
    """Write one line per line of `metrics.jsonl`, with a column per metric."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    with (
        raise_storage_errors(path),
        path.open("w", newline="", encoding="utf-8", errors="replace") as file,  # names may be no text
    ):
        writer = csv.DictWriter(file, ["run", *names])
        writer.writeheader()
        writer.writerows({"run": run.name, **row} for run in runs for row in run.rows)


def draw_png(runs: list[RunRecord], path: Path) -> None:
    """Draw the charts of the page with matplotlib."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        raise ConfigError("--png: the package matplotlib is missing; pip install matplotlib") from None
    charts = build_charts(runs)
    rows = math.ceil(len(charts) / 3)
    figure = Figure(figsize=(15, 3.4 * rows), layout="constrained")
    for number, (kind, curves) in enumerate(charts, start=1):
        axes = figure.add_subplot(rows, 3, number, title=kind.title, xlabel="step", ylabel=kind.unit)
        axes.set_yscale("log" if kind.is_log else "linear")
        for curve in curves:
            style, color = ("-", "--", ":", "-.")[curve.dash], f"C{curve.color}"
            marker = "" if curve.points[1:] else "o"  # a line of one point is not visible
            axes.plot(*np.transpose(curve.points), label=curve.label, ls=style, color=color, marker=marker)
        axes.legend(fontsize=8)
    with open_atomic(path.resolve()) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(main())
