"""Attention for CUDA GPUs by Triton kernels (`--attention triton`).

Position scores are never written to memory.
"""

import importlib.util

import torch

from DeBERTa.ops.triton.launch import CAPABILITIES, HEAD_SIZES, MEASURED

HAS_TRITON = importlib.util.find_spec("triton") is not None


def find_obstacle(device: torch.device, head_size: int, is_default: bool = False) -> str | None:
    """Return why the kernels cannot run here, or None if they can.

    is_default: also return why they are not the default where they can run.
    """
    if device.type != "cuda":
        return f"its kernels need a CUDA GPU, not a {device.type.upper()}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if head_size not in HEAD_SIZES:
        return f"its kernels take heads of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"its kernels have not been compiled for compute capability {capability[0]}.{capability[1]}"
    if is_default and (capability, head_size) not in MEASURED:
        return f"its kernels have not been measured on this GPU with heads of {head_size}"
    return None
