"""Optional faster implementations of what model/ computes, selected by device (`--kernels`, `--attention`).

`select_implementations` is the seam: it changes the class of modules of model/ to a subclass from here.
Parameters and their names stay. Nothing else imports this package, and deleting it leaves plain PyTorch.

| device | attention                | everything else                                    |
| ------ | ------------------------ | -------------------------------------------------- |
| CPU    | blocked (cpu/attention)  | C++ kernels (cpu/)                                 |
| CUDA   | sdpa (attention.py)      | plain PyTorch                                      |
"""

import torch
from torch import nn

from DeBERTa.model.attention import DisentangledSelfAttention
from DeBERTa.ops import cpu
from DeBERTa.ops.attention import SdpaSelfAttention
from DeBERTa.ops.cpu import library


def select_implementations(model: nn.Module, device: torch.device, attention: str, is_compiled: bool) -> str:
    """Use the faster implementations for `device`; return the attention in use.

    attention: "auto", "eager" or "sdpa". is_compiled: `torch.compile` will see the layers, which stay plain
    PyTorch then but for sdpa.
    """
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    if device.type == "cpu":
        subclasses |= cpu.HEAD_SUBCLASSES if is_compiled else cpu.SUBCLASSES
    if attention == "auto":
        attention = "sdpa" if device.type == "cuda" else "eager" if is_compiled else "blocked"
    if attention == "sdpa":
        subclasses[DisentangledSelfAttention] = SdpaSelfAttention
    elif attention == "eager":
        subclasses.pop(DisentangledSelfAttention, None)
    if device.type == "cuda":
        # cuDNN's attention returns NaN gradients for some lengths, and rounds p to 1/16 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module) in subclasses:
            module.__class__ = subclasses[type(module)]
    return attention


def describe(device: torch.device) -> str:
    """Return what "auto" means on `device`, for people."""
    if device.type != "cpu":
        return "sdpa attention"
    obstacle = library.find_obstacle()
    if obstacle:
        return f"CPU kernels on PyTorch's operations, slower: {obstacle}"
    return "compiled CPU kernels, AMX" if library.has_tiles() else "compiled CPU kernels"
