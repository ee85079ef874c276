"""`--dry_run`: take a few steps, and describe what the run will need.

The steps are those of the run itself, the last with a checkpoint in memory, and an evaluation follows: the
peak of memory is the run's. Nothing is written.
"""

import math
import shutil
import time
from pathlib import Path

import torch

from DeBERTa.data.loader import load_batches
from DeBERTa.doctor import check_machine
from DeBERTa.model.flops import count_flops_per_token
from DeBERTa.report.read import format_duration
from DeBERTa.training.banner import describe_run, format_rows
from DeBERTa.training.distributed import get_world_size
from DeBERTa.training.evaluation import evaluate
from DeBERTa.training.metrics import measure_peak_memory
from DeBERTa.training.run_dir import check_disk_space
from DeBERTa.training.trainer import Run, take_snapshot

DRY_RUN = ".dry-run"  # what is appended to the run directory
WARM_UP, MEASURED = 2, 3  # steps; the first allocate, compile and fill caches


def describe_dry_run(run: Run) -> str:
    """Return what a run is and what it needs, after a few steps.

    Collective: every rank calls it. Raises `StorageError` if the disk is too small.
    """
    config, device, steps = run.config, run.training.device, run.training.total_steps
    run_dir = Path(str(run.run_dir).removesuffix(DRY_RUN)).resolve()  # it can be a mount point, or a link
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    evaluations = math.ceil(steps / config.dump_interval)
    disk = check_disk_space(folder, run.model, evaluations, config.keep_last)
    step_seconds, length = time_steps(run)
    evaluation_seconds = time_evaluation(run)
    total = format_duration(steps * step_seconds + evaluations * evaluation_seconds)
    flops = config.train_batch_size * length * count_flops_per_token(run.model.config, length)
    kind = "allocated on the GPU" if device.type == "cuda" else "resident"
    checks = {name: f"{found}{'; ' if advice else ''}{advice}" for name, found, advice in check_machine()}
    needs = {
        "run": "tried, not started: nothing was written",
        "memory": f"{measure_peak_memory(device):.2f} GB per rank at the peak, {kind}",
        "time": f"{total}: {step_seconds:.3g} s per step, {evaluations:,} evaluations of "
        f"{evaluation_seconds:.3g} s",
        "compute": f"{flops * steps:.3g} FLOPs in matmuls, {flops:.3g} per step: "
        f"{flops / step_seconds / get_world_size() / 1e12:.3g} TFLOP/s per rank",
        "disk": f"{disk / 1e9:.3g} GB for checkpoints and final models; "
        f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}",
        "shared memory": checks["shared memory"],
    }
    return format_rows(describe_run(run, 0) | needs)


def time_steps(run: Run) -> tuple[float, int]:
    """Take a few steps, and return the seconds per step and the padded length.

    The first ones do not count, nor does the last, during which a checkpoint is held as while one is written.
    """
    training, number = run.training, WARM_UP + MEASURED + 1
    training.set_learning_rate(1)
    # Its usual scale overflows at first. A skipped update would leave out moments, and the optimizer's time.
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 1.0})
    run.model.train()
    snapshot, started, seconds, lengths = None, 0.0, 0.0, 0
    batches = load_batches(run.train_batches, range(number), run.config.workers)
    for step, batch in enumerate(batches, start=1):
        training(batch)
        if step == WARM_UP:
            started = read_clock(training.device)
        if WARM_UP < step <= WARM_UP + MEASURED:
            lengths += batch.input_ids.size(1)
        if step == WARM_UP + MEASURED:
            seconds = read_clock(training.device) - started
            snapshot = take_snapshot(run, step)
    del snapshot
    return seconds / MEASURED, round(lengths / MEASURED)


def time_evaluation(run: Run) -> float:
    """Evaluate one batch per split, and return the seconds of an evaluation of all."""
    training, seconds = run.training, 0.0
    for batches in (run.evaluation[split] for split in ("valid", "replay") if split in run.evaluation):
        started = read_clock(training.device)
        evaluate(training, [batches[0]], 1, batches.token_counts)
        seconds += (read_clock(training.device) - started) * math.ceil(len(batches) / get_world_size())
    return seconds


def read_clock(device: torch.device) -> float:
    """Return the time in seconds when all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
