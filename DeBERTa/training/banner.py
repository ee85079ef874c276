"""Summary that a run logs before it starts, and its `environment.json`."""

import dataclasses
import hashlib
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from DeBERTa import __version__
from DeBERTa.files import hash_file
from DeBERTa.model.pretraining import RTDModel, count_backbone_parameters, count_embedding_parameters
from DeBERTa.training.distributed import get_world_size
from DeBERTa.training.execution import describe_kernels
from DeBERTa.training.optimizer import compute_lr_factor, describe_schedule
from DeBERTa.training.trainer import Run
from DeBERTa.training.worker import get_num_nodes

SOURCE_SUFFIXES = (".py", ".cpp", ".h")
SHARDING = {
    "none": "DDP: the full model in each",
    "zero2": "ZeRO-2: gradients and optimizer state sharded",
    "fsdp": "FSDP: parameters, gradients and optimizer state sharded",
}


def format_rows(rows: dict[str, str]) -> str:
    """Return a line per name and value."""
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())


def describe_run(run: Run, first_step: int) -> dict[str, str]:
    """Return the summary of a run: task, hardware, batch, steps, sizes and data."""
    config, training, store = run.config, run.training, run.train_batches.store
    batch = f"{config.train_batch_size} sequences of {config.max_seq_length}"
    if config.accumulative_update > 1:
        batch += f", in {config.accumulative_update} micro-batches"
    ranks, nodes = get_world_size(), get_num_nodes()
    processes = "1"
    if ranks > 1:
        batch += f", {config.train_batch_size / ranks:g} per rank"
        processes = (
            f"{ranks} processes on {nodes} node{'s' if nodes > 1 else ''}, {SHARDING[config.sharding]}"
        )
    tokens = config.train_batch_size * config.max_seq_length
    task = "masked language modeling"
    models: dict[str, nn.Module] = {"model": run.model}
    if isinstance(run.model, RTDModel):
        models = dict(run.model.named_children())
        order = "decoupled" if "generator" in training.optimizers else "joint"
        task = f"replaced token detection, {run.model.config.embedding_sharing.upper()}, {order} updates"
    sizes = [
        f"{name} {count_backbone_parameters(model) / 2**20:.1f}M + "
        f"{count_embedding_parameters(model) / 2**20:.1f}M embedding"
        for name, model in models.items()
    ]
    splits = [f"{split} {len(batches.store):,} lines" for split, batches in run.evaluation.items()]
    device = f"{get_device_name(training.device)}, precision {training.precision}"
    rows = {
        "run": str(run.run_dir),
        "task": task,
        "device": f"{device}, {_describe_kernels(run)}",
        "processes": processes,
        "batch": f"{batch}: {tokens:,} tokens per step",
        "steps": f"{training.total_steps:,}, {describe_schedule(config, training.total_steps)}"
        + (f"; {_describe_resume(run, first_step)}" if first_step else ""),
        "parameters": f"{', '.join(sizes)} (M = 2^20)",
        **{f"from ({name})": str(loaded) for name, loaded in run.initial_weights.items()},
        "data": f"{config.data_dir}: {store.meta.num_tokens:,} tokens in {len(store):,} lines; "
        + (", ".join(splits) or "no validation split"),
    }
    if run.notes:
        rows["note"] = "; ".join(run.notes)
    return rows


def _describe_kernels(run: Run) -> str:
    kernels = run.settings["train"]["kernels"]
    return describe_kernels(kernels, run.attention, run.config, run.training.device)


def _describe_resume(run: Run, first_step: int) -> str:
    total_steps = run.training.total_steps
    if first_step == total_steps:
        return f"resuming from step {first_step:,}, the last"
    factor = compute_lr_factor(first_step + 1, total_steps, run.config)
    return f"resuming from step {first_step:,} at {factor:.3g} of the peak learning rate"


def describe_code() -> dict[str, str]:
    """Return what determines the results of a run besides its settings.

    That is a hash of this package, and libraries.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    # Regular files: editors leave links that lead nowhere.
    for path in sorted(p for p in package.rglob("*") if p.suffix in SOURCE_SUFFIXES and p.is_file()):
        digest.update(f"{path.relative_to(package).as_posix()}\0{hash_file(path)}\n".encode())
    return {"package_sha256": digest.hexdigest(), "torch": torch.__version__, "numpy": np.__version__}


def collect_environment(run: Run) -> dict:
    """Return command, versions, machine, and weights of `--init_*`."""
    return {
        "command": sys.argv,
        "deberta": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "device": get_device_name(run.training.device),
        "kernels": _describe_kernels(run),
        "threads": torch.get_num_threads(),
        "processes": get_world_size(),
        "nodes": get_num_nodes(),
        "initial_weights": {name: dataclasses.asdict(loaded) for name, loaded in run.initial_weights.items()},
    }


def get_device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"CPU ({model}, {torch.get_num_threads()} threads)"
