"""Execution of a model on a device.

Precision, kernels, attention, checkpointing and compilation follow from the flags `--precision`, `--kernels`,
`--attention`, `--gradient_checkpointing` and `--compile`.
"""

import importlib.util
import logging
import os
from contextlib import AbstractContextManager

import torch
from torch import nn

from DeBERTa.compilers import find_compiler_obstacle, set_compiler_caches
from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError
from DeBERTa.model.encoder import Encoder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_GRAPHS = 512  # of torch.compile, per function: more than 64 lengths of two widths in two modes

logger = logging.getLogger(__name__)


def set_execution(model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, str]:
    """Prepare `model`, which is on `device`, for training.

    Parameters and their names do not change. Returns the resolved values of `--kernels` and `--attention`.
    Raises ConfigError where `--compile` has no compiler.
    """
    is_compiled = resolve_compile(config, device)
    if is_compiled:
        check_compiler(device)
        # Graphs of all layers count together, by width, mode and length. With the default of 8, generators of
        # another width run eagerly at some lengths, and recomputed layers fail.
        torch.compiler.config.recompile_limit = MAX_GRAPHS
        torch.compiler.config.accumulated_recompile_limit = MAX_GRAPHS
    if device.type == "cuda":  # before the first matmul
        set_compiler_caches()
        obstacle = find_compiler_obstacle(device)
        if obstacle and config.compile is None and config.kernels == "auto":
            logger.warning("layers are not compiled, and Triton attention is not used: %s", obstacle)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
    resolved = select_kernels(model, config, device)
    # By default, one graph serves the first length, and a second one all others. With sdpa each length has
    # its own: for a symbolic length its views take minutes to trace, and torch 2.11 fails.
    is_dynamic = False if resolved["attention"] == "sdpa" else None
    for encoder in (module for module in model.modules() if isinstance(module, Encoder)):
        encoder.gradient_checkpointing = config.gradient_checkpointing
        if is_compiled:
            for layer in encoder.layer:
                layer.compile(dynamic=is_dynamic)
    return resolved


def resolve_compile(config: TrainConfig, device: torch.device) -> bool:
    """Return whether `--compile` applies.

    By default it does on a GPU with Triton and what that needs, unless `--kernels off`.
    """
    if config.compile is not None:
        return config.compile
    return device.type == "cuda" and config.kernels == "auto" and find_compiler_obstacle(device) is None


def select_kernels(model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, str]:
    """Use the implementations of DeBERTa/ops in `model`, and return those in use."""
    plain = {"kernels": "off", "attention": "eager"}
    if config.kernels == "off":
        return plain
    if importlib.util.find_spec("DeBERTa.ops") is None:
        if config.attention not in ("auto", "eager"):
            raise ConfigError(
                f"--attention {config.attention}: the package DeBERTa/ops is missing; use --attention auto"
            )
        logger.warning("the package DeBERTa/ops is missing: plain PyTorch is used, as with --kernels off")
        return plain
    from DeBERTa.ops import select_implementations  # optional

    precision, is_compiled = resolve_precision(config, device), resolve_compile(config, device)
    attention = select_implementations(model, device, config.attention, precision, is_compiled)
    return {"kernels": "auto", "attention": attention}


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError unless torch.compile has its compilers."""
    if obstacle := find_compiler_obstacle(device):
        raise ConfigError(f"--compile: {obstacle}, or omit --compile")


def describe_kernels(kernels: str, attention: str, config: TrainConfig, device: torch.device) -> str:
    """Return the resolved kernels and attention on `device`, and TF32 on a GPU."""
    is_compiled = resolve_compile(config, device)
    tf32 = f", TF32 {'on' if config.tf32 else 'off'}" if device.type == "cuda" else ""
    if kernels == "off":
        return "plain PyTorch" + (", layers compiled by torch.compile" if is_compiled else "") + tf32
    from DeBERTa.ops import describe_implementations

    return f"{describe_implementations(device, is_compiled)}, {attention} attention{tf32}"


def resolve_precision(config: TrainConfig, device: torch.device) -> str:
    """Return the precision to use: fp32, bf16 or fp16.

    "auto" selects bf16 where the hardware multiplies it natively, fp16 with loss scaling on GPUs that do not,
    and fp32 elsewhere. Raises `ConfigError` for bf16 on a GPU without it.
    """
    has_bf16, is_gpu = has_native_bf16(device), device.type == "cuda"
    if config.precision == "bf16" and is_gpu and not has_bf16:
        raise ConfigError("--precision bf16: this GPU has no bfloat16 arithmetic; give fp16 or auto")
    if config.precision != "auto":
        return config.precision
    if config.fp16 is False:
        return "fp32"
    return "bf16" if has_bf16 else "fp16" if is_gpu else "fp32"


def explain_precision(config: TrainConfig, precision: str) -> list[str]:
    """Return a note if `--fp16 True` does not mean float16 on this hardware."""
    if not config.fp16 or precision == "fp16":
        return []
    name = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    return [f"--fp16 True trains in {name} on this device; --precision fp16 selects float16"]


def has_native_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 arithmetic is native.

    It is on GPUs from Ampere on, and on CPUs with AMX or AVX-512 bfloat16 instructions.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the context in which matmuls run in `precision`."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), precision in DTYPES)


def build_loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, which is enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
