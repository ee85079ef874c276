"""Execution of a model: kernels, attention, checkpointing, compilation.

The flags are `--kernels`, `--attention`, `--gradient_checkpointing` and `--compile`.
"""

import importlib.util
import logging
import os
import shutil
import sys

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError
from DeBERTa.model.encoder import Encoder

MAX_GRAPHS = 64  # of torch.compile, per function

logger = logging.getLogger(__name__)


def set_execution(model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, str]:
    """Prepare `model`, which is on `device`, for training.

    Parameters and their names do not change. Returns the resolved values of `--kernels` and `--attention`.
    Raises ConfigError where `--compile` has no compiler.
    """
    is_compiled = resolve_compile(config, device)
    if is_compiled:
        check_compiler(device)
        # Graphs of all layers count together, by width, mode and length (static, then dynamic). With the
        # default of 8, generators of another width run eagerly at some lengths, and recomputed layers fail.
        torch.compiler.config.recompile_limit = MAX_GRAPHS
    if device.type == "cuda":
        set_matmul_precision(config)
    resolved = select_kernels(model, config, device)
    for encoder in (module for module in model.modules() if isinstance(module, Encoder)):
        encoder.gradient_checkpointing = config.gradient_checkpointing
        if is_compiled:
            for layer in encoder.layer:
                layer.compile()  # one graph serves all layers of a shape
    return resolved


def resolve_compile(config: TrainConfig, device: torch.device) -> bool:
    """Return whether `--compile` applies: by default on a GPU with Triton, unless `--kernels off`."""
    if config.compile is not None:
        return config.compile
    return device.type == "cuda" and config.kernels == "auto" and has_triton()


def has_triton() -> bool:
    """Return whether the package triton is installed, with which torch.compile works on a GPU."""
    return importlib.util.find_spec("triton") is not None


def set_matmul_precision(config: TrainConfig) -> None:
    """Apply `--tf32` and `--deterministic` to this process.

    Call it before the first matmul on the GPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


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

    attention = select_implementations(model, device, config.attention, resolve_compile(config, device))
    return {"kernels": "auto", "attention": attention}


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError unless torch.compile has its compiler.

    That is Triton on a GPU and a C++ compiler on a CPU.
    """
    if device.type != "cpu":
        if not has_triton():
            raise ConfigError("--compile: a GPU needs the package triton; install it, or omit --compile")
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile: there is no C++ compiler {compiler}; install it, name another one in the "
            "environment variable CXX, or omit --compile"
        )


def describe_kernels(kernels: str, attention: str, config: TrainConfig, device: torch.device) -> str:
    """Return a description of the resolved kernels and attention on `device`."""
    is_compiled = resolve_compile(config, device)
    if kernels == "off":
        return "plain PyTorch" + (", layers compiled by torch.compile" if is_compiled else "")
    from DeBERTa.ops import describe_implementations

    return f"{describe_implementations(device, is_compiled)}, {attention} attention"
