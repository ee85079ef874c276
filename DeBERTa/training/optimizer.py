"""AdamW with the published parameter groups, and the learning-rate schedule as a function of the step."""

import torch
from torch import nn

from DeBERTa.config import TrainConfig


def build_optimizer(models: list[tuple[nn.Module, float]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over models, each with its peak learning rate; biases and LayerNorm weights are not decayed.

    The peak stays in each group under "peak", for the schedule to scale.
    """
    groups = []
    for model, peak in models:
        decayed, plain = [], []
        for name, parameter in model.named_parameters():
            without = name.endswith("bias") or ".LayerNorm." in name
            (plain if without else decayed).append(parameter)
        groups.append({"params": decayed, "weight_decay": config.weight_decay, "lr": peak, "peak": peak})
        groups.append({"params": plain, "weight_decay": 0.0, "lr": peak, "peak": peak})
    return torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.epsilon, fused=True)


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """`--warmup` as a number of steps: given as such if at least 1, else as a proportion of `total_steps`."""
    return round(config.warmup if config.warmup >= 1 else config.warmup * total_steps)


def schedule(update: int, total_steps: int, warmup: int, end: float) -> float:
    """Factor on the peak learning rate for update number `update` (from 1).

    Rises linearly to 1 at update `warmup`, then falls linearly to `end` at update `total_steps`.
    """
    if update < warmup:
        return update / warmup
    if total_steps <= warmup:
        return 1.0
    return 1 - (1 - end) * (update - warmup) / (total_steps - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
