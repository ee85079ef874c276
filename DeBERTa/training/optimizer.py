"""AdamW with the published parameter groups, and the learning-rate schedule."""

import math

import torch
from torch import nn

from DeBERTa.config import TrainConfig

WSD_DECAY_START = 0.9  # proportion of all updates
LARGE = 2**20  # elements: PyTorch's norm of so many on a CPU is off by 1e-5, and by more for larger tensors


def build_optimizer(models: list[tuple[nn.Module, float]], config: TrainConfig) -> torch.optim.AdamW:
    """Create AdamW over models, each with its peak learning rate.

    Source: Loshchilov and Hutter, algorithm 2.
    Biases and LayerNorm weights are not decayed. Each group stores its peak under "peak", for the schedule to
    scale.
    """
    groups = []
    for model, peak in models:
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_plain = name.endswith("bias") or ".LayerNorm." in name
            (plain if is_plain else decayed).append(parameter)
        groups.append({"params": decayed, "weight_decay": config.weight_decay, "lr": peak, "peak": peak})
        groups.append({"params": plain, "weight_decay": 0.0, "lr": peak, "peak": peak})
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.epsilon, fused=True)


def compute_gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients as one vector.

    PyTorch sums the squares of a tensor on a CPU in float32 in sequence: 0.4 % off for a table of 49 million
    elements. For large tensors the norm is computed from the norms of the rows.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.numel() > LARGE else g for g in gradients]
    return nn.utils.get_total_norm(rows)


def count_warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the value of `--warmup` in steps.

    Values of at least 1 are steps, and smaller ones a proportion of `total_steps`.
    """
    return round(warmup if warmup >= 1 else warmup * total_steps)


def compute_lr_factor(update: int, total_steps: int, config: TrainConfig) -> float:
    """Return the factor on the peak learning rate for update number `update` (from 1).

    It rises linearly to 1 at the end of warm-up, then decays to `lr_schedule_ends` at update `total_steps`:
    along a line, half a cosine (Loshchilov and Hutter, SGDR, equation 5), or a line that starts after 90 % of
    the updates (`wsd`: warm-up, stable, decay; Hu et al., MiniCPM, section 4, with exponential decay).
    Skipped updates count. The factor depends on nothing else, so that a resumed run, also one made longer,
    has the rates of an uninterrupted one.
    """
    warmup, end = count_warmup_steps(config.warmup, total_steps), config.lr_schedule_ends
    if update < warmup:
        return update / warmup
    start = find_decay_start(config, total_steps)
    if config.lr_schedule == "constant" or update <= start or total_steps <= start:
        return 1.0
    if config.lr_schedule == "cosine":
        return end + (1 - end) * (1 + math.cos(math.pi * (update - start) / (total_steps - start))) / 2
    return 1 - (1 - end) * (update - start) / (total_steps - start)


def find_decay_start(config: TrainConfig, total_steps: int) -> int:
    """Return the last update with the peak learning rate."""
    warmup = count_warmup_steps(config.warmup, total_steps)
    if config.lr_schedule != "wsd":
        return warmup
    return max(warmup, min(round(WSD_DECAY_START * total_steps), total_steps - 1))


def describe_schedule(config: TrainConfig, total_steps: int) -> str:
    """Return the schedule in words."""
    warmup, kind = count_warmup_steps(config.warmup, total_steps), config.lr_schedule
    if kind == "constant":
        return f"warm-up {warmup:,}, constant"
    if kind == "wsd":
        kind = f"linear decay from step {find_decay_start(config, total_steps):,}"
    else:
        kind += " decay"
    return f"warm-up {warmup:,}, {kind} to {config.lr_schedule_ends:g}"
