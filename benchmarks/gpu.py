"""What only a GPU can show: correctness, reproducibility, speed.

    python -m benchmarks.gpu OUT [--parts correctness runs steps ...] [--toy]

benchmarks/gpu.sh calls it. Each part is a process of its own with a time limit, and its output goes to
OUT/PART.log. OUT/results.json has the figures, OUT.tar.gz all of it. A part that fails does not stop the
others. `--toy` takes small sizes, and the CPU where there is no GPU: a dry run of the script itself.
"""

import argparse
import contextlib
import filecmp
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from benchmarks.about import describe_machine
from benchmarks.training_step import (
    CONFIGS,
    ROOT,
    Case,
    build_ours,
    format_row,
    make_batch,
    measure_in_process,
    read_head_config,
    summarize,
    synchronize,
)
from DeBERTa.config import ModelConfig, read_json
from DeBERTa.model.encoder import Deberta
from DeBERTa.ops import select_implementations
from DeBERTa.ops.triton import find_obstacle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED, NOT_COMPILED = {"compile": True}, {"compile": False}
XSMALL = "rtd_xsmall_continue.json"
STEPS = [  # what matters most comes first: time may not be enough for all
    Case("rtd_base.json", 32, flags=NOT_COMPILED),
    Case("rtd_base.json", 32, flags=COMPILED),
    Case("rtd_base.json", 128, flags=COMPILED),
    Case("rtd_base.json", 64, who="composed"),  # twice as many would take more than 80 GB
    Case(XSMALL, 256, flags=COMPILED),
    Case(XSMALL, 128, who="composed"),
    Case("rtd_large.json", 32, flags=COMPILED),
    Case("rtd_base.json", 32, flags={"attention": "sdpa"} | NOT_COMPILED),
    Case("rtd_base.json", 32, who="eager"),
    Case("rtd_base.json", 128, flags=NOT_COMPILED),
]
TOY_STEPS = [
    Case("rtd_tiny.json", 2, 64, flags={"attention": "sdpa"} | NOT_COMPILED),
    Case("rtd_tiny.json", 2, 64, who="composed"),
]
RUNS = {  # flags of pairs of runs; the first of each is also resumed
    "deterministic": ["--deterministic", "True"],
    "default": [],
    "deterministic, not compiled": ["--deterministic", "True", "--compile", "False"],
    "sdpa": ["--attention", "sdpa", "--compile", "False"],
    "fp16": ["--precision", "fp16", "--compile", "False"],
}
TOY_RUNS = {"eager": ["--attention", "eager"]}
PARTS = {  # seconds at most
    "correctness": 115,
    "runs": 100,
    "attention": 30,
    "steps": 160,
    "synchronization": 25,
    "profile": 35,
}
LARGEST_ARCHIVE = 16 * 2**20
STOP_SIGNALS: list[int] = []  # that this process has received: it ends with what there is


def run_correctness(out: Path, _is_toy: bool) -> dict:
    """Run tests/gpu, and return how many passed, failed and were skipped.

    All are skipped on a CPU. Golden figures in float32 with TF32 off, with kernels, and kernels against
    float64.
    """
    report = out / "correctness.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-rA", f"--junitxml={report}", "tests/gpu"]
    if importlib.util.find_spec("xdist"):  # most of the time is compilation
        command += ["-n", "8"]
    status = subprocess.run(command, check=False, cwd=ROOT).returncode
    if not report.exists():
        sys.exit(f"pytest ended with status {status}: pip install -r tests/requirements.txt")
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = counts["failures"] + counts["errors"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"], "pytest_status": status}


def start_tiny(run_dir: Path, cache: Path, steps: int, flags: list[str]) -> subprocess.Popen:
    """Start or resume a run of the tiny preset with dropout."""
    data = cache / "sample" / "128"
    values: dict[str, object] = {
        "task_name": "RTD",
        "model_config": cache / "rtd_tiny_dropout.json",
        "data_dir": data,
        "vocab_path": cache / "sample" / "spm.model",
        "vocab_size": 8064,
        "max_seq_length": 128,
        "train_batch_size": 48 if steps > 4 else 4,
        "learning_rate": 2e-3,
        "warmup": 5,
        "num_training_steps": steps,
        "dump_interval": steps // 2,
        "log_interval": steps // 4,
        "output_dir": run_dir,
    }
    command = [sys.executable, "-m", "DeBERTa.train", "--do_train", *flags]
    for name, value in values.items():
        command += [f"--{name}", str(value)]
    with run_dir.with_name(f"{run_dir.name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def run_runs(out: Path, is_toy: bool) -> dict:
    """Compare the bits of two runs of the tiny preset, and of a resumed one.

    It is resumed from its middle.
    """
    cache, runs = out / "cache", out / "runs"
    runs.mkdir()
    os.environ["DEBERTA_CACHE"] = str(cache)
    prepare = ["--corpus", "sample", "--train_vocab", "8000", "--max_seq_length", "128"]
    subprocess.run([sys.executable, "prepare_data.py", *prepare], check=True, cwd=ROOT)
    values = read_json(CONFIGS / "rtd_tiny.json")
    for part in ("generator", "discriminator"):
        values[part] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (cache / "rtd_tiny_dropout.json").write_text(json.dumps(values))
    kinds, steps = (TOY_RUNS, 4) if is_toy else (RUNS, 20)
    last = Path("checkpoints", f"step-{steps:08}")

    def is_same(*names: str) -> bool:
        weights = [runs / name / last / "model.safetensors" for name in names]
        return all(path.exists() for path in weights) and filecmp.cmp(*weights, shallow=False)

    pairs = {
        kind: [start_tiny(runs / f"{kind}-{n}", cache, steps, kinds[kind]) for n in (1, 2)] for kind in kinds
    }
    result: dict[str, dict] = {}
    for kind, processes in pairs.items():
        statuses = [process.wait() for process in processes]
        result[kind] = {"statuses": statuses, "twice_same_bits": is_same(f"{kind}-1", f"{kind}-2")}
    (out / "runs.result.json").write_text(json.dumps(result))  # what there is when time is up
    # A run that failed early has left no directory; its log says why.
    kinds = {kind: flags for kind, flags in kinds.items() if (runs / f"{kind}-1").exists()}
    for kind in kinds:
        shutil.copytree(runs / f"{kind}-1", runs / f"{kind}-resumed")
        shutil.rmtree(runs / f"{kind}-resumed" / last, ignore_errors=True)
    resumed = {kind: start_tiny(runs / f"{kind}-resumed", cache, steps, kinds[kind]) for kind in kinds}
    for kind, process in resumed.items():
        result[kind]["statuses"].append(process.wait())
        result[kind]["resumed_same_bits"] = is_same(f"{kind}-1", f"{kind}-resumed")
    for checkpoints in runs.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    return result


def run_attention(_out: Path, is_toy: bool) -> dict:
    """Measure one attention layer of base by implementation, in milliseconds."""
    values = read_json(CONFIGS / ("rtd_tiny.json" if is_toy else "rtd_base.json"))["discriminator"]
    config = ModelConfig.from_dict(values | {"num_hidden_layers": 1, "attention_probs_dropout_prob": 0.1})
    sequences, length = (2, 64) if is_toy else (32, 512)
    hidden = torch.randn(sequences, length, config.hidden_size, device=DEVICE, requires_grad=True)
    mask = torch.ones(sequences, length, dtype=torch.bool, device=DEVICE)
    result = {}
    has_kernels = find_obstacle(torch.device(DEVICE), config.head_size) is None
    for name in ("triton",) * has_kernels + ("sdpa", "eager"):
        model = Deberta(config, "gdes").to(DEVICE)
        select_implementations(model, torch.device(DEVICE), name, "bf16", is_compiled=False)
        attention = model.encoder.layer[0].attention.self
        inputs = (hidden, *attention.parameters())
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            positions = model.encoder.compute_relative_positions(length)

        def attend(attention=attention, positions=positions) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                return attention(hidden, mask, positions)

        def differentiate(attend=attend, inputs=inputs) -> None:
            context = attend()
            torch.autograd.grad(context, inputs, torch.ones_like(context))

        for what, function in (("forward", attend), ("forward and backward", differentiate)):
            function()
            timer = Timer("function()", globals={"function": function})
            measured = timer.blocked_autorange(min_run_time=0.2 if is_toy else 2.0)
            result[f"{name}, {what}"] = round(1e3 * measured.median, 3)
    return result


def run_steps(out: Path, is_toy: bool) -> dict:
    """Measure one step of each case, in a process of its own."""
    rows = []
    for case in TOY_STEPS if is_toy else STEPS:
        case = case._replace(device=DEVICE, steps=2 if is_toy else 10)
        row = case._asdict()
        try:
            result = measure_in_process(case, timeout=90)
            row |= result | summarize([result], None)
        except subprocess.CalledProcessError as error:
            row["error"] = (error.stderr.strip() or f"status {error.returncode}").splitlines()[-1]
            print(error.stderr, file=sys.stderr)
        except subprocess.TimeoutExpired:
            row["error"] = "out of time"
        rows.append(row)
        print(json.dumps(row), flush=True)
        (out / "steps.result.json").write_text(json.dumps(rows, indent=1))  # what there is when time is up
    return {"cases": rows}


def build_probe(is_toy: bool) -> tuple:
    """Return a step, and a function that makes batches for it.

    The step is compiled as a run on this device is, at a size that the part "steps" has compiled before.
    """
    config_name = "rtd_tiny.json" if is_toy else "rtd_base.json"
    size, length = (2, 64) if is_toy else (32, 512)
    vocabulary = read_head_config(config_name)["vocab_size"]
    step = build_ours(config_name, "bf16", DEVICE)
    return step, lambda number: make_batch(size, length, number, vocabulary)


def run_synchronization(_out: Path, is_toy: bool) -> dict:
    """Name the places at which one step waits for the device."""
    step, make = build_probe(is_toy)
    step(make(0))
    if DEVICE == "cpu":
        return {"places": None}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(make(1))
    torch.cuda.set_sync_debug_mode("default")
    return {"places": sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught}), "times": len(caught)}


def run_profile(out: Path, is_toy: bool) -> dict:
    """Write the time of one step by kernel to OUT/profile.txt."""
    step, make = build_probe(is_toy)
    for number in range(3):
        step(make(number))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step(make(3))
        synchronize(DEVICE)
    order = f"self_{DEVICE}_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (out / "profile.txt").write_text(table)
    return {"table": "profile.txt"}


def run_part(part: str, out: Path, is_toy: bool) -> dict:
    """Run one part in a process of its own; return its status, and its result if any."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--one", "--parts", part]
    command += ["--toy"] * is_toy
    limit = PARTS[part] * (5 if is_toy else 1)  # on a CPU that others may use
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        while process.poll() is None and time.perf_counter() < started + limit and not STOP_SIGNALS:
            time.sleep(0.2)
        status: int | str = "stopped" if STOP_SIGNALS else "out of time"
        if process.returncode is not None:
            status = process.returncode
        # Also the processes that it started: they would take time from the next part.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    file = out / f"{part}.result.json"
    try:
        result = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):  # killed before, or while it was written
        result = {}
    if isinstance(result, list):
        result = {"cases": result}
    return result | {"status": status, "part_seconds": round(time.perf_counter() - started, 1)}


def write_archive(out: Path) -> Path:
    """Write OUT.tar.gz: logs, figures and metrics, without checkpoints and data."""
    patterns = ("*.log", "*.json", "*.txt", "runs/*.log", "runs/*/metrics.jsonl")
    files = [path for pattern in patterns for path in out.glob(pattern)]
    archive = out.with_name(f"{out.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(files):
            if path.stat().st_size < LARGEST_ARCHIVE // 4:
                tar.add(path, str(path.relative_to(out.parent)))
    return archive


def print_table(results: dict) -> None:
    """Print the device and a short table."""
    print(f"\n{results['device']}, torch {results['versions']['torch']}, commit {results['commit']}")
    for part, result in results["parts"].items():
        figures = {key: value for key, value in result.items() if key not in ("cases", "part_seconds")}
        print(f"{part} ({result['part_seconds']} s): {json.dumps(figures)}")
    columns = f"{'ms/step':>10}{'tokens/s':>11}{'peak GB':>9}{'GFLOP':>10}{'MFU':>8}"
    print(f"{'':<60}{columns}")
    for case in results["parts"].get("steps", {}).get("cases", []):
        flags = " ".join(f"{name}={value}" for name, value in case["flags"].items())
        name = f"{case['config']:<26}{case['sequences']:>4}x{case['length']:<4} {case['who']:<9}{flags}"
        print(f"{name:<60}" + (case["error"][:80] if "error" in case else format_row(case)))


def main() -> None:
    """Run all parts, write results and archive, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the raw output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="small sizes: a dry run")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.one:
        (part,) = arguments.parts
        result = globals()[f"run_{part}"](out, arguments.toy)
        (out / f"{part}.result.json").write_text(json.dumps(result))
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"{out} is not empty: give a new folder")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    results: dict = describe_machine() | {"device": device, "parts": {}}
    for part in arguments.parts:
        if STOP_SIGNALS:
            break
        results["parts"][part] = run_part(part, out, arguments.toy)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(part, results["parts"][part]["status"], flush=True)
    archive = write_archive(out)
    size = archive.stat().st_size
    print(f"{archive}: {size / 2**20:.1f} MiB{', too large' if size >= LARGEST_ARCHIVE else ''}")
    print_table(results)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: STOP_SIGNALS.append(number))
    main()
    sys.exit(128 + STOP_SIGNALS[0] if STOP_SIGNALS else 0)
