"""Pre-training of DeBERTa encoders."""

import importlib
import sys
from typing import TYPE_CHECKING

from DeBERTa.errors import ConfigError
from DeBERTa.packages import require_packages

if TYPE_CHECKING:
    from DeBERTa.config import ModelConfig, RTDConfig, TrainConfig
    from DeBERTa.model.pretraining import MaskedLanguageModel, ReplacedTokenDetectionModel, RTDModel

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "MaskedLanguageModel",
    "ModelConfig",
    "RTDConfig",
    "RTDModel",
    "ReplacedTokenDetectionModel",
    "TrainConfig",
    "__version__",
]

if sys.argv[:1] == ["-m"]:  # a command, before it imports anything
    require_packages()


def __getattr__(name: str) -> object:
    """Import public names at first use, so that preparing data does not load torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "DeBERTa.config" if name.endswith("Config") else "DeBERTa.model.pretraining"
    return getattr(importlib.import_module(module), name)
