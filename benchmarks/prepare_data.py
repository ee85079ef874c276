"""Measure speed and memory of prepare_data.py against the straightforward loop.

    python benchmarks/prepare_data.py --megabytes 300 --rounds 3 --json result.json

Both encode the bundled sample, repeated, in processes of their own, in turns (A B A B), start-up included.
Memory is the largest sum of the proportional set sizes (PSS) of a process and all its descendants, sampled
five times per second. CPU seconds of all processes show how much of the difference is less work, and how much
more cores. Needs Linux.
"""

import argparse
import json
import lzma
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MAX_SEQ_LENGTH = 512


def encode_in_loop(source: Path, output: Path, vocabulary: Path) -> None:
    """Encode every line with `encode_as_pieces`, then split one list of all tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    tokens = []
    with source.open(encoding="utf-8") as file:
        for line in file:
            tokens.extend(processor.encode_as_pieces(line))
    width = MAX_SEQ_LENGTH - 2
    with output.open("w", encoding="utf-8") as file:
        for start in range(0, len(tokens), width):
            file.write(" ".join(tokens[start : start + width]) + "\n")


def find_descendants(process: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [process]
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found.extend(find_descendants(int(child)))
    return found


def measure_memory(process: int) -> int:
    """Return the PSS of a process and descendants in bytes; 0 if one of them ended."""
    try:
        total = 0
        for member in find_descendants(process):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total
    except (FileNotFoundError, ProcessLookupError):
        return 0


@dataclass
class Run:
    """One run of a command."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def get_cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: list[str]) -> Run:
    """Run a command."""
    start, cpu_start = time.perf_counter(), get_cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, measure_memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return Run(seconds, get_cpu_seconds() - cpu_start, peak)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300, help="size of the text")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "benchmarks", help="where the files go"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--loop", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        encode_in_loop(*arguments.loop)
        return

    from DeBERTa.data.corpus import SAMPLE
    from DeBERTa.data.prepare import count_usable_cores
    from DeBERTa.data.vocabulary import find_or_train_vocabulary

    arguments.folder.mkdir(parents=True, exist_ok=True)
    text, output = arguments.folder / "text.txt", arguments.folder / "prepared.txt"
    vocabulary = find_or_train_vocabulary([SAMPLE], 8000, arguments.folder / "spm.model")
    sample = lzma.decompress(SAMPLE.read_bytes())
    with text.open("wb") as file:
        while file.tell() < arguments.megabytes * 1_000_000:
            file.write(sample)
    megabytes = text.stat().st_size / 1e6
    ours = [sys.executable, str(ROOT / "prepare_data.py"), "-i", str(text), "-o", str(output)]
    commands = {
        "prepare_data.py": [*ours, "--vocab_path", str(vocabulary)],
        "straightforward loop": [sys.executable, __file__, "--loop", str(text), str(output), str(vocabulary)],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            output.unlink(missing_ok=True)
            run = measure(command)
            runs[name].append(run)
            print(
                f"{name}: {megabytes / run.seconds:.1f} MB/s, load {os.getloadavg()[0]:.1f}", file=sys.stderr
            )
    output.unlink()

    print("| | MB/s, median (all runs) | CPU seconds, median | peak memory, MB |\n| --- | --- | --- | --- |")
    for name, measured in runs.items():
        speeds = [megabytes / run.seconds for run in measured]
        every = ", ".join(f"{speed:.1f}" for speed in speeds)
        cpu = statistics.median(run.cpu_seconds for run in measured)
        peak = max(run.peak_bytes for run in measured) / 1e6
        print(f"| {name} | {statistics.median(speeds):.1f} ({every}) | {cpu:.1f} | {peak:.0f} |")
    medians = [statistics.median(run.seconds for run in measured) for measured in runs.values()]
    ratio = medians[1] / medians[0]
    print(f"\n{ratio:.2f} times the speed, on {megabytes:.0f} MB of text and {count_usable_cores()} cores")
    figures = {"megabytes": megabytes, "cores": count_usable_cores(), "ratio": ratio}
    figures |= {name: [asdict(run) for run in measured] for name, measured in runs.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
