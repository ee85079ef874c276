"""Where the time of one training step goes, operator by operator.

    python benchmarks/profile_step.py [--case rtd-xsmall] [--precision bf16] [--output benchmarks/profile.txt]

Profiles steps of a case of `training_step.py` after two warm-up steps, with `torch.profiler`, and prints and
keeps a table of the operators. Self time is that of an operator without the operators it calls, on the thread
that calls it: what other threads do for it meanwhile is not added. Functions with a backward pass of our own
appear under their names.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.about import about  # noqa: E402
from benchmarks.training_step import CASES, make_batch, ours  # noqa: E402

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="rtd-xsmall")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=40, help="operators to list; the rest is added up")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "profile.txt")
    arguments = parser.parse_args()

    config_name, size, length = CASES[arguments.case]
    torch.manual_seed(0)
    step = ours(config_name, arguments.precision)
    batches = [make_batch(size, length, number) for number in range(2 + STEPS)]
    for batch in batches[:2]:
        step(batch)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches[2:]:
            step(batch)
        seconds = time.perf_counter() - started

    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    here = about()
    lines = [
        f"{arguments.case} ({config_name}), {size} x {length} tokens, {arguments.precision}, dropout on",
        f"command  {here['command']}",
        f"commit   {here['commit']}",
        f"machine  {here['machine']['processor']}, {here['machine']['threads']} threads",
        f"torch    {torch.__version__}",
        f"date     {here['date']}",
        f"step     {seconds / STEPS:.2f} s under the profiler, {total / STEPS / 1e6:.2f} s in operators",
        "",
        f"{'self, ms/step':>16}{'share':>8}{'calls/step':>14}  operator",
    ]
    rows = [(event.self_cpu_time_total, event.count, event.key) for event in events[: arguments.rows]]
    rest = events[arguments.rows :]
    rows.append(
        (sum(e.self_cpu_time_total for e in rest), sum(e.count for e in rest), f"({len(rest)} others)")
    )
    for microseconds, calls, name in rows:
        lines.append(
            f"{microseconds / STEPS / 1e3:>16.1f}{microseconds / total:>8.1%}{calls / STEPS:>14.1f}  {name}"
        )
    text = "\n".join(lines) + "\n"
    print(text, end="")
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
