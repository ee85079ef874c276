"""Measure what a checkpoint costs: size, seconds to write, seconds of waiting.

    python benchmarks/checkpoint.py --json results.json [--rounds 5]

The public xsmall size (`rtd_xsmall_continue.json`) with AdamW moments. "training waits" is the time until
training continues (the state is copied). "written" is the time until the manifest is synced and the directory
renamed, with and without training steps at the same time. "verify" is what a start needs to compare the
SHA-256 of every file. The steps are of one line of 512 tokens in bfloat16 where the hardware has it, timed
with and without a save at the same time.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.about import describe_machine  # noqa: E402
from benchmarks.training_step import build_ours, make_batch  # noqa: E402
from DeBERTa.training.checkpoint import Saver, Snapshot, get_checkpoint_path, verify  # noqa: E402
from DeBERTa.training.parallel import gather_to_rank_zero  # noqa: E402
from DeBERTa.training.steps import TrainingStep  # noqa: E402


def take(training: TrainingStep, step: int) -> Snapshot:
    """Copy the state of `training`."""
    state = {"training": training.state_dict()}
    return Snapshot(step, gather_to_rank_zero(training.model.state_dict()), state, {"step": step}, {})


def measure_seconds(function: Callable, *arguments: object) -> float:
    """Call a function; return the seconds it took."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def measure(folder: Path, rounds: int, precision: str) -> dict[str, list[float]]:
    """Return the seconds of every round, by what was timed."""
    training = build_ours("rtd_xsmall_continue.json", precision)
    batch = make_batch(1, 512, 0, training.model.config.generator.vocab_size)
    for _ in range(2):
        training(batch)
    saver = Saver(folder, keep_last=1)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for number in range(rounds):
        first, second = 2 * number + 1, 2 * number + 2
        note("step", statistics.median(measure_seconds(training, batch) for _ in range(3)))
        started = time.perf_counter()
        snapshot = take(training, first)
        saver.save(snapshot, None)
        note("training waits", time.perf_counter() - started)
        saver.wait()
        note("written, nothing else running", time.perf_counter() - started)
        del snapshot
        note("verify", measure_seconds(verify, get_checkpoint_path(folder, first)))

        started = time.perf_counter()
        saver.save(take(training, second), None)
        steps = []
        while not (done := saver.check()):
            steps.append(measure_seconds(training, batch))
        assert done == get_checkpoint_path(folder, second)
        note("written while training", time.perf_counter() - started)
        note("step while saving", statistics.mean(steps))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--folder", type=Path, default=Path("output") / "checkpoint-benchmark", help="written, removed"
    )
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"--folder {arguments.folder} exists; it would be removed")
    try:
        (arguments.folder / "checkpoints").mkdir(parents=True)
        found = measure(arguments.folder, arguments.rounds, arguments.precision)
        newest = get_checkpoint_path(arguments.folder, 2 * arguments.rounds)
        size = sum(path.stat().st_size for path in newest.iterdir())
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(f"size {size / 1e6:,.0f} MB")
    for name, values in found.items():
        print(f"{name:<32}{statistics.median(values):>8.2f} s  ({min(values):.2f} to {max(values):.2f})")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(describe_machine() | {"bytes": size, "seconds": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
