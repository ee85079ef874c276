"""What a run says of itself before it starts, and keeps in `environment.json`."""

import platform
import sys

import numpy as np
import torch

from DeBERTa import __version__
from DeBERTa.config import TrainConfig
from DeBERTa.model.pretraining import RTDModel, count_backbone_parameters, count_embedding_parameters
from DeBERTa.training.distributed import get_num_nodes, get_world_size
from DeBERTa.training.execution import describe_kernels
from DeBERTa.training.optimizer import count_warmup_steps
from DeBERTa.training.trainer import Run


def banner(run: Run, first_step: int) -> str:
    """What is about to happen, for a person."""
    config, training = run.config, run.training
    store = run.train_batches.store
    steps = f"{training.total_steps:,}, warm-up {count_warmup_steps(config, training.total_steps):,}"
    tokens = config.train_batch_size * config.max_seq_length
    parts = f", in {config.accumulative_update} parts" if config.accumulative_update > 1 else ""
    if get_world_size() > 1:
        parts += f", {config.train_batch_size / get_world_size():g} a process"
    held_out = [f"{split} {len(batches.store):,} lines" for split, batches in run.evaluation.items()]
    kernels = describe_kernels(run.settings["train"]["kernels"], training.device)
    rows = {
        "run": str(run.run_dir),
        "task": _task(run),
        "device": f"{device_name(training.device)}, precision {training.precision}, {kernels}",
        "processes": _processes(config),
        "batch": f"{config.train_batch_size} sequences of {config.max_seq_length}{parts}: {tokens:,} tokens a step",
        "steps": steps + (f"; resuming from step {first_step:,}" if first_step else ""),
        "parameters": f"{_sizes(run)} (M = 2^20)",
        "data": f"{config.data_dir}: {store.meta.num_tokens:,} tokens in {len(store):,} lines; "
        + (", ".join(held_out) or "no validation split"),
    }
    return "\n".join(f"{name:>10}  {value}" for name, value in rows.items())


def _processes(config: TrainConfig) -> str:
    """How many, where, and what each holds."""
    if get_world_size() == 1:
        return "1"
    mode = (
        "ZeRO-2: gradients and optimizer state sharded"
        if config.sharding == "zero2"
        else "DDP: the whole model in each"
    )
    mode = "FSDP: parameters, gradients and optimizer state sharded" if config.sharding == "fsdp" else mode
    return (
        f"{get_world_size()} processes on {get_num_nodes()} node{'s' if get_num_nodes() > 1 else ''}, {mode}"
    )


def _task(run: Run) -> str:
    if not isinstance(run.model, RTDModel):
        return "masked language modelling"
    order = "decoupled" if run.training.is_decoupled else "joint"
    return f"replaced token detection, {run.model.config.embedding_sharing.upper()}, {order} updates"


def _sizes(run: Run) -> str:
    """Backbone and word embedding of each model."""
    model = run.model
    if isinstance(model, RTDModel):
        parts = {"generator": model.generator, "discriminator": model.discriminator}
    else:
        parts = {"model": model}
    return ", ".join(
        f"{name} {count_backbone_parameters(part) / 2**20:.1f}M + {count_embedding_parameters(part) / 2**20:.1f}M embedding"
        for name, part in parts.items()
    )


def environment(device: torch.device) -> dict:
    """What ran where: command, versions, machine."""
    return {
        "command": sys.argv,
        "deberta": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": get_world_size(),
        "nodes": get_num_nodes(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"CPU ({model}, {torch.get_num_threads()} threads)"
