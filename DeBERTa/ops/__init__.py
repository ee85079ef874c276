"""Optional faster implementations of model/, selected by device.

`select_implementations` is the seam: it changes the class of modules of model/ to a subclass from here, and
the passes of LM heads over logits.
Parameters and their names stay. Deleting this package leaves plain PyTorch.

| device | attention                                   | everything else      |
| ------ | ------------------------------------------- | -------------------- |
| CPU    | blocked (cpu/attention.py)                  | C++ kernels (cpu/)   |
| CUDA   | triton (triton/) where it was measured,     | losses.py, and       |
|        | else sdpa (attention.py)                    | autocast.py or       |
|        |                                             | compiled layers      |
"""

import torch
from torch import nn

from DeBERTa.errors import ConfigError
from DeBERTa.model.attention import DisentangledSelfAttention
from DeBERTa.model.encoder import Encoder, Layer
from DeBERTa.model.heads import LMHead
from DeBERTa.model.losses import ChunkOperations
from DeBERTa.ops import triton
from DeBERTa.ops.attention import SdpaEncoder, SdpaSelfAttention
from DeBERTa.ops.autocast import AutocastLayer
from DeBERTa.ops.cpu import library, modules
from DeBERTa.ops.cpu.losses import CpuChunkOperations
from DeBERTa.ops.losses import GPU_CHUNK, CompiledChunkOperations


def select_implementations(
    model: nn.Module, device: torch.device, attention: str, precision: str, is_compiled: bool
) -> str:
    """Use the faster implementations for `device`, and return the attention in use.

    attention: "auto", "eager", "sdpa" or "triton". precision: fp32, bf16 or fp16.
    is_compiled: `torch.compile` compiles the layers, which then stay plain PyTorch except for attention.
    Raises ConfigError where the attention cannot run.
    """
    attention = _choose_attention(model, device, attention, precision, is_compiled)
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    if not is_compiled:
        subclasses |= modules.SUBCLASSES if device.type == "cpu" else {Layer: AutocastLayer}
    operations: ChunkOperations = CpuChunkOperations()
    if device.type != "cpu":
        operations = (CompiledChunkOperations if is_compiled else ChunkOperations)(GPU_CHUNK)
    if attention == "eager":
        subclasses.pop(DisentangledSelfAttention, None)
    elif attention == "sdpa":
        subclasses |= {DisentangledSelfAttention: SdpaSelfAttention, Encoder: SdpaEncoder}
    elif attention == "triton":
        from DeBERTa.ops.triton.modules import TritonEncoder, TritonSelfAttention

        subclasses |= {DisentangledSelfAttention: TritonSelfAttention, Encoder: TritonEncoder}
    if device.type == "cuda":
        # cuDNN's attention returns NaN gradients for some lengths, and rounds p to 1/16 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if isinstance(module, LMHead):
            module.operations = operations
        if type(module) in subclasses:
            module.__class__ = subclasses[type(module)]
    return attention


def _choose_attention(
    model: nn.Module, device: torch.device, attention: str, precision: str, is_compiled: bool
) -> str:
    """Return the attention that `attention` selects for `model` on `device`."""
    if attention not in ("auto", "triton"):
        return attention
    default_in = precision if attention == "auto" else None
    sizes = {m.head_size for m in model.modules() if isinstance(m, DisentangledSelfAttention)}
    found = [triton.find_obstacle(device, size, default_in) for size in sorted(sizes)]
    obstacles = [obstacle for obstacle in found if obstacle is not None]
    if attention == "triton" and obstacles:
        advice = f"{', or' if ';' in obstacles[0] else ';'} use --attention auto"
        raise ConfigError(f"--attention triton: {obstacles[0]}{advice}")
    if device.type == "cpu":
        return "eager" if is_compiled else "blocked"
    if device.type == "cuda":
        return "sdpa" if obstacles else "triton"
    return "eager"


def describe_implementations(device: torch.device, is_compiled: bool) -> str:
    """Return a description of what computes all but attention on `device`."""
    if device.type != "cpu":
        return f"layers and LM head {'compiled by torch.compile' if is_compiled else 'in eager PyTorch'}"
    obstacle = library.find_obstacle()
    if obstacle:
        kernels = f"CPU kernels on PyTorch's operations, slower: {obstacle}"
    else:
        kernels = "compiled CPU kernels, AMX" if library.has_tiles() else "compiled CPU kernels"
    return f"layers compiled by torch.compile, {kernels} in the head" if is_compiled else kernels
