"""Attention for CUDA GPUs by Triton kernels (`--attention triton`).

Position scores are never written to memory.
"""

import importlib.util

import torch

from DeBERTa.ops.triton.launch import CAPABILITIES, HEAD_SIZES, has_run

HAS_TRITON = importlib.util.find_spec("triton") is not None


def find_obstacle(device: torch.device, head_size: int) -> str | None:
    """Return why the kernels cannot run here, or None if they can."""
    if device.type != "cuda":
        return f"its kernels need a CUDA GPU, not a {device.type.upper()}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if head_size not in HEAD_SIZES:
        return f"its kernels take heads of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"its kernels have not been compiled for compute capability {capability[0]}.{capability[1]}"
    return None


def find_doubt(device: torch.device, head_size: int) -> str | None:
    """Return why `--attention auto` takes another attention, or None if it takes this."""
    obstacle = find_obstacle(device, head_size)
    capability = torch.cuda.get_device_capability(device) if obstacle is None else (0, 0)
    if obstacle is None and not has_run(capability, head_size):
        return (
            f"its kernels have not been run on compute capability {capability[0]}.{capability[1]} with heads "
            f"of {head_size}; --attention triton runs them"
        )
    return obstacle
