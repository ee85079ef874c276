"""Precision of training on this hardware: autocast and loss scaler."""

from contextlib import AbstractContextManager

import torch

from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(config: TrainConfig, device: torch.device) -> str:
    """Return the precision to use: fp32, bf16 or fp16.

    "auto" selects bf16 where the hardware multiplies it natively, fp16 with loss scaling on GPUs that do not,
    and fp32 elsewhere. Raises `ConfigError` for bf16 on a GPU without it.
    """
    has_bf16 = has_native_bf16(device)
    if config.precision == "auto":
        if config.fp16 is False:
            return "fp32"
        if has_bf16:
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if config.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError(
            "--precision bf16: this GPU has no bfloat16 arithmetic; use --precision fp16 or auto"
        )
    return config.precision


def describe_replaced_precision(config: TrainConfig, precision: str) -> list[str]:
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
    return torch.autocast(
        device.type, dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES
    )


def build_loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, which is enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
