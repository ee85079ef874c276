"""Send the metrics of a run to a tracker, during training or after it.

    python experiments/track.py output/deberta-v3-tiny --tracker tensorboard [--follow]

It reads `metrics.jsonl` in a process of its own, so that nothing it meets can end the run. The trackers are
packages to install: tensorboard, wandb or trackio.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from DeBERTa.command import run_command
from DeBERTa.errors import ConfigError
from DeBERTa.flags import FlagParser
from DeBERTa.report.read import RunRecord, is_number, read_run

FOLLOW_SECONDS = 10
NOT_SENT = {"step", "elapsed_seconds"}
Send = Callable[[dict[str, float], int], None]


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(track)


def track() -> None:
    """Send all lines, with `--follow` until the last evaluation."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--tracker", choices=("tensorboard", "wandb", "trackio"), required=True)
    parser.add_argument(
        "--follow", action="store_true", help="wait for further lines until the run is complete"
    )
    flags = parser.parse_args()
    run = read_run(flags.run)
    try:
        send, close = open_tracker(flags.tracker, run)
    except ModuleNotFoundError as error:
        message = f"--tracker {flags.tracker}: {error}; pip install {flags.tracker}"
        raise ConfigError(message) from None
    sent: set[tuple] = set()
    try:
        send_lines(run, send, sent)
        while flags.follow and not is_complete(run):
            time.sleep(FOLLOW_SECONDS)
            run = read_run(flags.run)
            send_lines(run, send, sent)
    finally:
        close()


def is_complete(run: RunRecord) -> bool:
    """Return whether the last step and its evaluation are there.

    The evaluation may take minutes more.
    """
    kind = "valid" if run.settings.get("validation", {}).get("valid_sha256") else "train"
    return any(row["kind"] == kind and row["step"] >= run.total_steps for row in run.rows)


def open_tracker(name: str, run: RunRecord) -> tuple[Send, Callable[[], object]]:
    """Return functions that send the metrics of a step, and that close the tracker."""
    if name == "tensorboard":
        writer = import_module("torch.utils.tensorboard").SummaryWriter(run.path / "tensorboard")

        def send_scalars(metrics: dict[str, float], step: int) -> None:
            for metric, value in metrics.items():
                writer.add_scalar(metric, value, step)

        return send_scalars, writer.close
    tracker = import_module(name)
    tracker.init(project="deberta", name=run.name, config=run.train)
    return tracker.log, tracker.finish


def send_lines(run: RunRecord, send: Send, sent: set[tuple]) -> None:
    """Send the lines that were not sent, those of one step together."""
    steps: dict[int, dict[str, float]] = {}
    for row in run.rows:
        key = (row["step"], row["kind"], row.get("time"))
        if key not in sent:
            sent.add(key)
            values = {name: value for name, value in row.items() if is_number(value) and name not in NOT_SENT}
            metrics = {f"{row['kind']}/{name}": float(value) for name, value in values.items()}
            steps.setdefault(row["step"], {}).update(metrics)
    for step, metrics in steps.items():
        send(metrics, step)


if __name__ == "__main__":
    sys.exit(main())
