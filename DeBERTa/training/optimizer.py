"""AdamW with the published parameter groups, and the learning-rate schedule as a function of the step."""

from collections.abc import Iterable

import torch

from DeBERTa.config import TrainConfig


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], peak: float, config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW over named parameters; biases and LayerNorm weights are not decayed.

    `peak` is the learning rate the schedule scales; it stays in each group under "peak".
    """
    decayed, plain = [], []
    for name, parameter in parameters:
        without = name.endswith("bias") or ".LayerNorm." in name
        (plain if without else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak": peak},
        {"params": plain, "weight_decay": 0.0, "peak": peak},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=peak,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.epsilon,
        fused=True,
    )


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
