"""Cost of our training step by length of the sequences and size of the batch.

    python benchmarks/lengths.py --json result.json [--rounds 3] [--steps 3]

RTD at the public xsmall size (`rtd_xsmall_continue.json`, `max_position_embeddings` raised where the length
needs it),
bfloat16, dropout on: 2048 tokens a step as 16 x 128 up to 1 x 2048, and 512 tokens a sequence in batches of 1
to 16. Measured as `training_step.py` measures: every measurement a process of its own, the median step after
two warm-up steps, the median of these over the rounds. The floor is the step's matmuls at the rate of
a large one: the median over all processes, so that shapes can be compared where a shared machine's rate
changes from minute to minute.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.about import build_environment, describe_machine  # noqa: E402
from benchmarks.training_step import Case, measure  # noqa: E402
from DeBERTa.config import read_json  # noqa: E402

CONFIG = ROOT / "experiments" / "language_model" / "rtd_xsmall_continue.json"
TABLES = {
    "length": [(2048 // length, length) for length in (128, 256, 512, 1024, 2048)],
    "batch": [(size, 512) for size in (1, 2, 4, 8, 16)],
}


def measure_shape(size: int, length: int, steps: int) -> dict:
    """In this process: `size` sequences of `length` tokens a step."""
    values = read_json(CONFIG)
    for part in ("generator", "discriminator"):
        values[part]["max_position_embeddings"] = max(length, 512)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / CONFIG.name
        config.write_text(json.dumps(values))
        return measure(Case(str(config), size, length, steps=steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each shape, in turns")
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SIZE", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_shape(*arguments.one, arguments.steps)))
        return

    shapes = list(dict.fromkeys(shape for table in TABLES.values() for shape in table))
    runs: dict[tuple[int, int], list[dict]] = {shape: [] for shape in shapes}
    for _ in range(arguments.rounds):
        for shape in shapes:
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--one", *map(str, shape)]
            env = build_environment()
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
            runs[shape].append(json.loads(output))
    rates = [result["matmul_rate"] for results in runs.values() for result in results]
    rate = statistics.median(rates)
    print(f"large matmuls: {rate / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})")
    rows = {shape: summarize_runs(*shape, results, rate) for shape, results in runs.items()}
    for name, table in TABLES.items():
        print(f"\nagainst the {name}:")
        print(f"{'shape':>12}{'s a step':>10}{'µs a token':>12}{'GFLOP':>8}{'of floor':>10}{'peak GB':>9}")
        for size, length in table:
            row = rows[size, length]
            print(
                f"{size:>5} x {length:<4}{row['seconds']:>10.2f}{row['microseconds_per_token']:>12.0f}"
                f"{row['flops'] / 1e9:>8.0f}{row['share_of_floor']:>10.0%}{row['peak_gb']:>9.2f}"
            )
    if arguments.json:
        figures = {"matmul_rates": rates, "shapes": list(rows.values())}
        arguments.json.write_text(json.dumps(describe_machine() | figures, indent=1) + "\n")


def summarize_runs(size: int, length: int, results: list[dict], rate: float) -> dict:
    """Medians of some processes; `rate` of large matmuls in FLOP/s."""
    seconds = [result["seconds"] for result in results]
    flops = results[0]["flops"]
    return {
        "batch": size,
        "length": length,
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "microseconds_per_token": statistics.median(seconds) / (size * length) * 1e6,
        "flops": flops,
        "share_of_floor": flops / rate / statistics.median(seconds),
        "peak_gb": statistics.median(result["peak_gb"] for result in results),
    }


if __name__ == "__main__":
    main()
