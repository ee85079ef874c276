"""Measure the time from the command to the end of the first step, and memory.

    python benchmarks/start_up.py --json result.json [--tokens 1200000 12000000 120000000] [--rounds 3]

Each text is lines of 510 random pieces of a vocabulary of 8000 pieces trained on the bundled sample. 120
million tokens are the size of WikiText-103. Every start is a process of its own that does what `python -m
DeBERTa.train` does, with the same functions, batch 64 x 512, two data workers, and the model of
`rtd_tiny.json`:

- a first start finds a text without a token store and builds it (prepare_data.py writes it with the text);
- a later start finds it. The page cache of the files is dropped before, so that they are read from the disk.

Parts of a later start: `imports` (from the start of the process, with `torch._dynamo`, which the first
optimizer imports), `ids` (vocabulary, config, opening the store), `model` (building model and optimizers),
`batch` (from starting the data workers to the first batch), `step`. `data` is the sum of imports, ids and
batch. `command` is a run of `python -m DeBERTa.train` until `metrics.jsonl` has the first step, as a check on
the sum.

Memory is anonymous memory of the process and its data workers, shared pages counted once (Pss_Anon), after 50
batches and before the first step. Mapped pages of the files are not counted: the kernel can take them back at
any time. Needs Linux; everything runs on the CPU.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.about import describe_machine  # noqa: E402
from benchmarks.prepare_data import find_descendants  # noqa: E402
from DeBERTa.data.corpus import SAMPLE  # noqa: E402
from DeBERTa.data.dataset import BatchPlan, TrainingBatches  # noqa: E402
from DeBERTa.data.loader import load_batches  # noqa: E402
from DeBERTa.data.masking import Masker  # noqa: E402
from DeBERTa.data.token_store import get_store_path  # noqa: E402
from DeBERTa.data.tokenizer import SPECIAL_PIECES, Tokenizer  # noqa: E402
from DeBERTa.data.vocabulary import find_or_train_vocabulary  # noqa: E402
from DeBERTa.memory import keep_freed_memory  # noqa: E402
from DeBERTa.model.pretraining import build_model  # noqa: E402
from DeBERTa.train import load_model_config, open_split, parse_flags  # noqa: E402
from DeBERTa.training.execution import resolve_precision  # noqa: E402
from DeBERTa.training.steps import ReplacedTokenStep  # noqa: E402

PIECES_PER_LINE = 510
PARTS = ("imports", "ids", "model", "batch")


def write_text(path: Path, tokenizer: Tokenizer, tokens: int) -> None:
    """Write lines of random pieces."""
    generator = np.random.default_rng(0)
    pieces = [piece.encode() for piece in tokenizer.pieces[:-1]]  # all but [MASK]
    with path.open("wb") as file:
        for _ in range(tokens // PIECES_PER_LINE):
            ids = generator.integers(len(SPECIAL_PIECES), len(pieces), PIECES_PER_LINE).tolist()
            file.write(b" ".join([pieces[i] for i in ids]) + b"\n")


def list_flags(folder: Path) -> list[str]:
    """Return the flags of one training step in `folder`."""
    return [
        *("--task_name", "RTD", "--do_train", "--model_config", "rtd_tiny.json", "--vocab_size", "8064"),
        *("--vocab_path", str(folder.parent / "spm.model"), "--data_dir", str(folder)),
        *("--output_dir", str(folder / "run"), "--train_batch_size", "64", "--num_training_steps", "1"),
    ]


def measure_first_start(folder: Path) -> dict[str, float]:
    """Return seconds and peak memory (MB) of building the token store."""
    config = parse_flags(list_flags(folder))
    tokenizer = Tokenizer(config.vocab_path)
    started = time.monotonic()
    open_split(config, config.data_dir, "train", tokenizer)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


def measure_later_start(folder: Path, started: float) -> dict[str, float]:
    """Return the seconds of each part, and `memory_mb`.

    `started`: when the process was started, in monotonic time.
    """
    importlib.import_module("torch._dynamo")
    times = [started, time.monotonic()]
    config = parse_flags(list_flags(folder))
    device = torch.device("cpu")
    precision = resolve_precision(config, device)
    keep_freed_memory()
    tokenizer = Tokenizer(config.vocab_path)
    model_config, _ = load_model_config(config, tokenizer)
    masker = Masker(tokenizer, 1, is_always_masked=True)
    store = open_split(config, config.data_dir, "train", tokenizer)
    times.append(time.monotonic())
    training = ReplacedTokenStep(
        build_model(model_config), config, precision, device, config.num_training_steps
    )
    times.append(time.monotonic())
    plan = BatchPlan(config.seed, config.train_batch_size, config.max_seq_length)
    batches = TrainingBatches(store, tokenizer, masker, plan)
    loader = iter(load_batches(batches, range(1_000_000), config.workers))
    batch = next(loader)
    times.append(time.monotonic())
    for _ in range(50):
        next(loader)
    memory = measure_memory()
    step_started = time.monotonic()
    training.set_learning_rate(1)
    training(batch)
    step = time.monotonic() - step_started
    seconds = {part: end - start for part, start, end in zip(PARTS, times[:-1], times[1:], strict=True)}
    data = seconds["imports"] + seconds["ids"] + seconds["batch"]
    return seconds | {"step": step, "data": data, "memory_mb": memory}


def measure_memory() -> float:
    """Return the anonymous memory of this process and its descendants, in MB."""
    kilobytes = 0
    for process in find_descendants(os.getpid()):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                kilobytes += int(line.split()[1])
    return kilobytes * 1024 / 1e6


def measure_command(folder: Path) -> float:
    """Return the seconds until `python -m DeBERTa.train` has logged its first step."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics = folder / "run" / "metrics.jsonl"
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        command = [sys.executable, "-m", "DeBERTa.train", *list_flags(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
            while not (metrics.exists() and metrics.read_bytes()):
                if process.poll() is not None:
                    output.seek(0)
                    raise SystemExit(output.read().decode())
                time.sleep(0.01)
            seconds = time.monotonic() - started
    return seconds


def drop_from_cache(folder: Path) -> None:
    """Drop the pages of a prepared text and its store from the page cache."""
    for path in (folder / "train.txt", get_store_path(folder / "train.txt")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_in_process(which: str, folder: Path) -> dict[str, float]:
    """Measure the first or a later start in a process of its own."""
    command = [sys.executable, __file__, "--one", which, str(folder), str(time.monotonic())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(folder: Path, tokens: int, tokenizer: Tokenizer, rounds: int) -> dict:
    """Measure all starts with a text of `tokens` tokens; medians of the later ones."""
    folder.mkdir()
    write_text(folder / "train.txt", tokenizer, tokens)
    result = {"tokens": tokens, "text_mb": (folder / "train.txt").stat().st_size / 1e6}
    result["first"] = run_in_process("first", folder)
    runs = []
    for _ in range(rounds):
        drop_from_cache(folder)
        runs.append(run_in_process("later", folder))
        drop_from_cache(folder)
        runs[-1]["command"] = measure_command(folder)
    result["later"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result["runs"] = runs
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_200_000, 12_000_000, 120_000_000])
    parser.add_argument("--rounds", type=int, default=3, help="later starts with each text")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "benchmarks",
        help="where the files are made (2 GB), and removed",
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--one", nargs=3, metavar=("WHICH", "FOLDER", "STARTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        which, folder, started = arguments.one
        print(
            json.dumps(
                measure_first_start(Path(folder))
                if which == "first"
                else measure_later_start(Path(folder), float(started))
            )
        )
        return

    results = []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    seconds = [*PARTS, "step", "data", "command"]
    columns = ["tokens", "text, MB", "first start, s", "its peak, MB", *seconds, "memory, MB"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        vocabulary = find_or_train_vocabulary([SAMPLE], 8000, Path(folder) / "spm.model")
        for tokens in arguments.tokens:
            result = measure(Path(folder) / str(tokens), tokens, Tokenizer(vocabulary), arguments.rounds)
            results.append(result)
            later = result["later"]
            row = [f"{tokens:,}", f"{result['text_mb']:.0f}", f"{result['first']['seconds']:.1f}"]
            row += [f"{result['first']['peak_mb']:.0f}", *(f"{later[name]:.2f}" for name in seconds)]
            print("| " + " | ".join([*row, f"{later['memory_mb']:.1f}"]) + " |", flush=True)
    print("\nSeconds are of a later start, the median, unless they say otherwise.")
    if arguments.json:
        arguments.json.write_text(json.dumps(describe_machine() | {"texts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
