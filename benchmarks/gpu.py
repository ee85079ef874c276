"""What only a GPU can show: correctness, reproducibility, speed (see benchmarks/gpu.sh).

    python -m benchmarks.gpu OUT [--parts golden runs steps ...] [--toy]

Each part is a process of its own with a time limit; its output goes to OUT/PART.log. `--toy` takes small
sizes, and the
CPU where there is no GPU: a dry run of the script itself.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.flops import flops_per_token
from benchmarks.training_step import make_batch, ours, theirs
from DeBERTa.config import read_json

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "experiments" / "language_model"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the vendor's data sheets
# Config, sequences, who, flags of the training command.
STEPS = [
    ("rtd_base.json", 32, "ours", {"attention": "triton"}),
    ("rtd_base.json", 32, "ours", {"attention": "triton", "compile": True}),
    ("rtd_base.json", 32, "ours", {"attention": "sdpa", "compile": True}),
    ("rtd_base.json", 32, "theirs", {}),
    ("rtd_base.json", 128, "ours", {"attention": "triton", "compile": True}),
    ("rtd_xsmall_continue.json", 64, "ours", {"attention": "triton", "compile": True}),
    ("rtd_xsmall_continue.json", 256, "ours", {"attention": "triton", "compile": True}),
    ("rtd_xsmall_continue.json", 64, "theirs", {}),
    ("rtd_large.json", 32, "ours", {"attention": "triton", "compile": True}),
]
TOY_STEPS = [("rtd_tiny.json", 2, "ours", {"attention": name}) for name in ("eager", "sdpa")]
PARTS = {"golden": 60, "runs": 150, "steps": 260, "synchronization": 40, "profile": 60}  # seconds at most


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    return "cuda" if has_gpu() else "cpu"


def run_golden(_out: Path, _toy: bool) -> dict:
    """Compare with the golden figures, in float32 with TF32 off."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "tests/gpu"]
    if importlib.util.find_spec("xdist"):  # most of the time is compilation
        command += ["-n", "8"]
    return {"passed": subprocess.run(command, check=False, cwd=ROOT).returncode == 0}


def train_tiny(folder: Path, cache: Path, *flags: str) -> subprocess.Popen:
    """Start a run of the tiny preset."""
    data = cache / "sample" / "128"
    config = cache / "rtd_tiny_dropout.json"
    values = read_json(CONFIGS / "rtd_tiny.json")
    for part in ("generator", "discriminator"):
        values[part] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config.write_text(json.dumps(values))
    command = [
        sys.executable,
        "-m",
        "DeBERTa.train",
        "--task_name",
        "RTD",
        "--model_config",
        str(config),
        "--do_train",
    ]
    command += [
        "--data_dir",
        str(data),
        "--vocab_path",
        str(cache / "sample" / "spm.model"),
        "--vocab_size",
        "8064",
    ]
    command += [
        "--max_seq_length",
        "128",
        "--train_batch_size",
        "48",
        "--learning_rate",
        "2e-3",
        "--warmup",
        "5",
    ]
    command += [
        "--num_training_steps",
        "20",
        "--dump_interval",
        "10",
        "--log_interval",
        "5",
        "--output_dir",
        str(folder),
    ]
    return subprocess.Popen([*command, *flags], cwd=ROOT)


def run_runs(out: Path, toy: bool) -> dict:
    """Compare the bits of two runs of the tiny preset, and of one resumed from its middle."""
    cache = out / "cache"
    os.environ["DEBERTA_CACHE"] = str(cache)
    prepare = [
        sys.executable,
        "prepare_data.py",
        "--corpus",
        "sample",
        "--train_vocab",
        "8000",
        "--max_seq_length",
        "128",
    ]
    subprocess.run(prepare, check=True, cwd=ROOT)
    runs = {}
    kinds = [["--attention", "triton"], ["--attention", "triton", "--deterministic", "True"]]
    kinds += [["--attention", "sdpa"], ["--attention", "triton", "--precision", "fp16"]]
    kinds = [["--attention", "eager"]] if toy else kinds
    for flags in kinds:
        name = "-".join(flag for flag in flags if not flag.startswith("--"))
        runs[name] = [(out / "runs" / f"{name}-{number}", flags) for number in (1, 2)]
    for attempt in (1, 2):  # the first run is resumed from its middle in the second round
        started = []
        for pair in runs.values():
            for folder, flags in (
                pair if attempt == 1 else [(pair[0][0].with_name(pair[0][0].name + "-resumed"), pair[0][1])]
            ):
                if attempt == 2:
                    subprocess.run(["cp", "-r", str(pair[0][0]), str(folder)], check=True)
                    subprocess.run(["rm", "-r", str(folder / "checkpoints" / "step-00000020")], check=True)
                started.append(train_tiny(folder, cache, *flags))
        for process in started:
            process.wait()
    result = {}
    for name, pair in runs.items():
        weights = [folder / "checkpoints" / "step-00000020" / "model.safetensors" for folder, _ in pair]
        resumed = (
            pair[0][0].with_name(pair[0][0].name + "-resumed")
            / "checkpoints"
            / "step-00000020"
            / "model.safetensors"
        )
        contents = [path.read_bytes() if path.exists() else None for path in (*weights, resumed)]
        result[name] = {
            "twice_the_same_bits": contents[0] is not None and contents[0] == contents[1],
            "resumed_the_same_bits": contents[0] is not None and contents[0] == contents[2],
            "last_line": (pair[0][0] / "metrics.jsonl").read_text().splitlines()[-1:],
        }
    return result


def measure_step(config_name: str, sequences: int, who: str, flags: dict, length: int = 512) -> dict:
    """Median seconds of ten steps after three, by synchronized clock; peak memory; MFU."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # for both
    device, started = device_name(), time.perf_counter()
    step = (
        ours(config_name, "bf16", device, **flags) if who == "ours" else theirs(config_name, "bf16", device)
    )
    values = read_json(CONFIGS / config_name)
    vocab = values["generator"]["vocab_size"]
    batches = [make_batch(sequences, length, number, vocab) for number in range(4)]
    if who == "theirs":
        batches = [batch.to(torch.device(device)) for batch in batches]
    seconds = []
    for number in range(13):
        if has_gpu():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step(batches[number % 4])
        if has_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if number > 4 and time.perf_counter() - started > 60:
            break
    median = sorted(seconds[3:])[len(seconds[3:]) // 2]
    rate = sequences * length / median
    result = {"seconds": median, "range": [min(seconds[3:]), max(seconds[3:])], "tokens_per_second": rate}
    if has_gpu():
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if peak:
            result["mfu"] = rate * flops_per_token(values, length) / peak
    return result


def run_steps(out: Path, toy: bool) -> dict:
    """Measure one step of each case, in a process of its own."""
    results = []
    for config_name, sequences, who, flags in TOY_STEPS if toy else STEPS:
        case = {"config": config_name, "sequences": sequences, "who": who, **flags}
        code = "import json, sys; from benchmarks.gpu import measure_step as m; a = json.loads(sys.argv[1])\n"
        code += "print(json.dumps(m(*a)))"
        arguments = json.dumps([config_name, sequences, who, flags, 64 if toy else 512])
        done = subprocess.run(
            [sys.executable, "-c", code, arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        if done.returncode:
            case["error"] = done.stderr.strip().splitlines()[-1]
            print(done.stderr, file=sys.stderr)
        else:
            case |= json.loads(done.stdout.splitlines()[-1])
        results.append(case)
        print(json.dumps(case), flush=True)
        (out / "steps.json").write_text(json.dumps(results, indent=1))  # what there is when time is up
    return {"cases": results}


def run_synchronization(_out: Path, toy: bool) -> dict:
    """Name the places at which one step waits for the device."""
    import warnings

    step = ours("rtd_tiny.json" if toy else "rtd_base.json", "bf16", device_name(), attention="auto")
    vocab = 8064 if toy else 128100
    batches = [make_batch(2 if toy else 8, 64 if toy else 512, number, vocab) for number in range(2)]
    step(batches[0])
    if not has_gpu():
        return {"places": None}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(batches[1])
    torch.cuda.set_sync_debug_mode("default")
    return {"places": sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught}), "times": len(caught)}


def run_profile(out: Path, toy: bool) -> dict:
    """Time on the device by kernel, for one step."""
    from torch.profiler import ProfilerActivity, profile

    step = ours("rtd_tiny.json" if toy else "rtd_base.json", "bf16", device_name(), attention="auto")
    vocab = 8064 if toy else 128100
    batches = [make_batch(2 if toy else 32, 64 if toy else 512, number, vocab) for number in range(4)]
    for batch in batches[:3]:
        step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
    with profile(activities=activities) as profiler:
        step(batches[3])
        if has_gpu():
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if has_gpu() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (out / "profile.txt").write_text(table)
    return {"table": "profile.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the raw output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="small sizes: a dry run")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        (part,) = arguments.parts
        result = globals()[f"run_{part}"](out, arguments.toy)
        (out / f"{part}.result.json").write_text(json.dumps(result))
        return
    results = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if has_gpu() else "cpu"}
    for part in arguments.parts:
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--one", "--parts", part]
        command += ["--toy"] * arguments.toy
        with (out / f"{part}.log").open("w") as log:
            try:
                status = subprocess.run(
                    command, stdout=log, stderr=log, timeout=PARTS[part], cwd=ROOT, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = "out of time"
        file = out / f"{part}.result.json"
        partial = out / "steps.json"
        result = json.loads(file.read_text()) if file.exists() else {}
        if part == "steps" and not result and partial.exists():
            result = {"cases": json.loads(partial.read_text())}
        results[part] = {"status": status, "seconds": round(time.perf_counter() - started, 1), **result}
        print(f"{part}: status {status}, {results[part]['seconds']} s", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def print_table(results: dict) -> None:
    print(f"\n{results['device']}, torch {results['torch']}")
    for part in ("golden", "runs", "synchronization"):
        if part in results:
            print(
                part, json.dumps({k: v for k, v in results[part].items() if k not in ("status", "seconds")})
            )
    for case in results.get("steps", {}).get("cases", []):
        flags = " ".join(f"{k}={v}" for k, v in case.items() if k in ("attention", "compile", "kernels"))
        name = f"{case['config']:<26}{case['sequences']:>4}x512 {case['who']:<7}{flags:<30}"
        if "error" in case:
            print(name, case["error"][:80])
        else:
            memory = f"{case['peak_gb']:.1f} GB" if "peak_gb" in case else ""
            mfu = f"MFU {case['mfu']:.1%}" if "mfu" in case else ""
            rate = f"{case['tokens_per_second']:>10,.0f} tokens/s"
            print(f"{name}{case['seconds'] * 1e3:>9.1f} ms {rate} {mfu} {memory}")


if __name__ == "__main__":
    main()
