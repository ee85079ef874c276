"""How a model's layers are computed: `--attention`, `--gradient_checkpointing`, `--compile`."""

import importlib.util
import os
import shutil
import sys

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError
from DeBERTa.model.backends import choose_backend
from DeBERTa.model.encoder import Encoder
from DeBERTa.training.distributed import is_rank_zero


def set_execution(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Set it in every encoder of `model`, which is on `device`. Parameters, and their names, stay as they are.

    Raises `ConfigError` where `--compile` has no compiler. Says on stderr why `--attention flash` is not what will run.
    """
    if config.compile:
        check_compiler(device)
    obstacles = {}  # in order, each once
    for encoder in (module for module in model.modules() if isinstance(module, Encoder)):
        backend, obstacle = choose_backend(config.attention, encoder.config, device)
        obstacles[obstacle] = backend
        encoder.gradient_checkpointing = config.gradient_checkpointing
        for layer in encoder.layer:
            layer.attention.self.backend = backend
            if config.compile:
                layer.compile()  # one graph serves all layers of a shape
    for obstacle, backend in obstacles.items():
        if obstacle is not None and is_rank_zero():
            print(
                f"--attention flash is not possible: {obstacle}; --attention {backend} is used",
                file=sys.stderr,
            )


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` unless torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type != "cpu":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--compile needs the package triton on a GPU: install it, or leave --compile out"
            )
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile needs a C++ compiler on a CPU, and there is no {compiler}: install it, name another one in the "
            "environment variable CXX, or leave --compile out"
        )
