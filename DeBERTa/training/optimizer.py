"""AdamW with the published parameter groups, clipping, and the learning-rate schedule as a function of the step.

On a CPU, kernels of model/optimizer.cpp read all gradients once for their norm, and take the update and its clipping in
one more pass over memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.model import kernels

LARGE = (
    2**20
)  # numbers, of which PyTorch's norm on a CPU is 1e-5 off; the error grows faster than their count


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (Loshchilov and Hutter, algorithm 2) with clipping."""

    factor = 1.0  # on the gradients of the next step

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)

    def clip(self, norm: torch.Tensor, limit: float) -> None:
        """Let all gradients as one vector, of `norm`, have a norm of `limit` at most in the next step."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if _plain(parameters):
            self.factor = min(limit / (float(norm) + 1e-6), 1.0)
        else:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        factor, self.factor = self.factor, 1.0
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        scaled = (
            getattr(self, "grad_scale", None) is not None
        )  # a loss scaler leaves it to PyTorch to undo its work
        if closure is not None or scaled or not _plain([p for _, parameters in groups for p in parameters]):
            return super().step(closure)
        calls = []
        for group, parameters in groups:
            rows = [[p, p.grad.contiguous(), *self._state(p)] for p in parameters]
            columns = list(zip(*rows, strict=True)) or [[]] * 5
            sizes = [p.numel() for p in parameters]
            addresses = [_addresses(tensors, sizes) for tensors in columns[:4]]
            addresses.append(_addresses(columns[4], [1] * len(rows)))
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], factor)
            calls.append(
                (columns, torch.stack(addresses), torch.tensor(sizes, dtype=torch.long), len(rows), *settings)
            )
        for (parameters, *_), addresses, *arguments in calls:
            kernels.find("adamw", addresses)(addresses, *arguments)
            torch.autograd.graph.increment_version(parameters)
        return None

    def _state(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both moments and the number of updates, under PyTorch's names."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients as one vector.

    On a CPU, PyTorch adds up the squares of a tensor in float32 one after the other, which for a table of 49 million
    numbers is 0.4 % off, and takes longer: without a kernel, that of a large table is made of the norms of its rows.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if _plain(parameters):
        gradients, norm = [p.grad.contiguous() for p in parameters], torch.zeros((), dtype=torch.float32)
        sizes = [g.numel() for g in gradients]
        addresses = _addresses(gradients, sizes)
        kernels.find("gradient_norm", addresses)(
            addresses, torch.tensor(sizes, dtype=torch.long), norm, len(sizes)
        )
        return norm
    gradients = [p.grad for p in parameters]
    parts = [torch.linalg.vector_norm(g, dim=-1) if g.numel() > LARGE else g for g in gradients]
    return nn.utils.get_total_norm(parts)


def _plain(parameters: list[nn.Parameter]) -> bool:
    """Whether the kernels can take these and their gradients."""
    fit = all(_fits(p) and p.grad.layout == torch.strided for p in parameters)
    return fit and kernels.find("adamw", torch.empty(0, dtype=torch.long)) is not None


def _fits(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _addresses(tensors: Sequence[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """int64 [tensors], for a kernel, while they are alive."""
    if not all(_fits(x) and x.numel() == size for x, size in zip(tensors, sizes, strict=True)):
        raise TypeError(
            "gradients and moments have to be contiguous float32 tensors, each of its parameter's size"
        )
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.long)


def build_optimizer(models: list[tuple[nn.Module, float]], config: TrainConfig) -> AdamW:
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
    return AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.epsilon)


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
