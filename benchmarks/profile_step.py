"""Where the time of one training step goes, operator by operator.

    python -m benchmarks.profile_step [--device cuda] [--case rtd-xsmall] [--output benchmarks/profile.txt]

Profiles steps of a case of `training_step.py` after two warm-up steps, with `torch.profiler`, and writes a
table of the operators. Self time is that of an operator without the operators it calls. On a CPU it is that
of the calling thread, without what other threads do for it. On a GPU it is that of the kernels.
Functions with a backward pass of our own appear under their names.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.about import describe_machine
from benchmarks.training_step import CASES, ROOT, build_ours, make_batch, read_head_config, synchronize

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="rtd-xsmall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sequences", type=int, help="in place of those of the case")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=40, help="operators to list; the rest is added up")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "profile.txt")
    arguments = parser.parse_args()

    config_name, on_cpu, on_gpu, length = CASES[arguments.case]
    device, is_gpu = arguments.device, arguments.device == "cuda"
    size = arguments.sequences or (on_gpu if is_gpu else on_cpu)
    torch.manual_seed(0)
    step = build_ours(config_name, arguments.precision, device)
    vocabulary = read_head_config(config_name)["vocab_size"]
    batches = [make_batch(size, length, number, vocabulary) for number in range(2 + STEPS)]
    for batch in batches[:2]:
        step(batch)
    synchronize(device)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_gpu]) as profiler:
        for batch in batches[2:]:
            step(batch)
        synchronize(device)
        seconds = time.perf_counter() - started

    def get_self_time(event) -> float:
        return event.self_device_time_total if is_gpu else event.self_cpu_time_total

    # On a GPU the operators hold the time of their kernels, and kernels and ranges have entries of their own.
    operators = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    events = sorted(operators, key=get_self_time, reverse=True)
    total = sum(map(get_self_time, events))
    here = describe_machine()
    lines = [
        f"{arguments.case} ({config_name}), {size} x {length} tokens, {arguments.precision}, dropout on",
        f"command  {here['command']}",
        f"commit   {here['commit']}",
        f"device   {torch.cuda.get_device_name() if is_gpu else here['machine']['processor']}",
        f"torch    {torch.__version__}",
        f"date     {here['date']}",
        f"step     {seconds / STEPS:.2f} s under the profiler, {total / STEPS / 1e6:.2f} s in operators",
        "",
        f"{'self, ms/step':>16}{'share':>8}{'calls/step':>14}  operator",
    ]
    rows = [(get_self_time(event), event.count, event.key) for event in events[: arguments.rows]]
    rest = events[arguments.rows :]
    rows.append((sum(map(get_self_time, rest)), sum(e.count for e in rest), f"({len(rest)} others)"))
    for microseconds, calls, name in rows:
        lines.append(
            f"{microseconds / STEPS / 1e3:>16.1f}{microseconds / total:>8.1%}{calls / STEPS:>14.1f}  {name}"
        )
    text = "\n".join(lines) + "\n"
    print(text, end="")
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
