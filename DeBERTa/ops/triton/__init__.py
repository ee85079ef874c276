"""Attention for CUDA GPUs by Triton kernels (`--attention triton`).

Position scores are never written to memory.
"""

import torch

from DeBERTa.compilers import find_compiler_obstacle
from DeBERTa.ops.triton.launch import CAPABILITIES, HEAD_SIZES, MEASURED


def find_obstacle(device: torch.device, head_size: int, precision: str | None = None) -> str | None:
    """Return why the kernels cannot run here, or None if they can.

    precision: also return why they are not the default in this precision where they can run.
    """
    if device.type != "cuda":
        return f"its kernels need a CUDA GPU, not a {device.type.upper()}"
    if head_size not in HEAD_SIZES:
        return f"its kernels take heads of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    if obstacle := find_compiler_obstacle(device):
        return obstacle
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"its kernels have not been compiled for compute capability {capability[0]}.{capability[1]}"
    if precision and (capability, head_size, precision) not in MEASURED:
        return f"its kernels have not been measured on this GPU with heads of {head_size} in {precision}"
    return None
