"""Measure time and memory of a large text through preparation and start-up.

    python benchmarks/large_text.py --megabytes 1000

The lines are parts of the bundled sample in random order, each with a number, so that no two are equal:
`prepare` (`prepare_data.py`, all cores), `index` (the token ids looked up in the prepared text, as for a copy
without its ids), `open` (a later start: the ids are verified), `shuffle` (the order of the first epoch),
`batch` (the first batch of 64 lines). Memory of `prepare` is the largest sum of the proportional set sizes of
its processes, that of the others the growth of anonymous memory. Needs Linux.
"""

import argparse
import json
import lzma
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.prepare_data import measure  # noqa: E402
from DeBERTa.data.corpus import SAMPLE  # noqa: E402
from DeBERTa.data.dataset import BatchPlan, TrainingBatches  # noqa: E402
from DeBERTa.data.masking import Masker  # noqa: E402
from DeBERTa.data.token_store import TokenStore, get_store_path, open_store  # noqa: E402
from DeBERTa.data.tokenizer import Tokenizer, split_at_spaces  # noqa: E402
from DeBERTa.data.vocabulary import find_or_train_vocabulary  # noqa: E402

LINE_BYTES = 500


def write_text(path: Path, megabytes: int) -> int:
    """Write the text; return the number of lines."""
    text = lzma.decompress(SAMPLE.read_bytes())
    lines = [piece for line in text.split(b"\n") if line for piece in split_at_spaces(line, LINE_BYTES)]
    generator, count = np.random.default_rng(0), 0
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            for index in generator.integers(len(lines), size=10_000).tolist():
                file.write(b"%d %s\n" % (count, lines[index]))
                count += 1
    return count


def read_anonymous_memory() -> float:
    """Return the anonymous memory of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e6


def run_part(folder: Path) -> None:
    """Open the text, shuffle it and make a batch; print seconds and memory as JSON."""
    tokenizer = Tokenizer(folder / "spm.model")
    results: dict[str, tuple[float, float, float]] = {}

    def run(name: str, function: Callable[[], object]) -> None:
        before, start, cpu_start = read_anonymous_memory(), time.perf_counter(), time.process_time()
        function()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        results[name] = seconds, cpu_seconds, read_anonymous_memory() - before

    stores: list[TokenStore] = []
    is_missing = not get_store_path(folder / "train.txt").exists()
    run(
        "index" if is_missing else "open",
        lambda: stores.append(open_store(folder / "train.txt", tokenizer, 510)),
    )
    batches = TrainingBatches(
        stores[0], tokenizer, Masker(tokenizer, 1, is_always_masked=True), BatchPlan(0, 64, 512)
    )
    run("shuffle", lambda: batches.select_lines(0))
    run("batch", lambda: batches[0])
    print(json.dumps(results))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "large", help="where the files go")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.part:
        run_part(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = find_or_train_vocabulary([SAMPLE], 8000, folder / "spm.model")
    lines = write_text(folder / "text.txt", arguments.megabytes)
    text, output = folder / "text.txt", folder / "train.txt"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "prepare_data.py"), "-i", str(text), "-o", str(output)]
    prepared = measure([*command, "--vocab_path", str(vocabulary)])
    print(f"{lines:,} lines, {text.stat().st_size / 1e6:,.0f} MB\n")
    print("| | seconds | CPU seconds | memory, MB |\n| --- | --- | --- | --- |")
    peak = prepared.peak_bytes / 1e6
    print(f"| prepare | {prepared.seconds:.1f} | {prepared.cpu_seconds:.1f} | {peak:.0f} |", flush=True)
    get_store_path(output).unlink()
    for _ in range(2):
        part = [sys.executable, __file__, "--part", "--folder", str(folder)]
        done = subprocess.run(part, capture_output=True, text=True, check=True)
        for name, (seconds, cpu_seconds, memory) in json.loads(done.stdout).items():
            print(f"| {name} | {seconds:.2f} | {cpu_seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
