"""Pre-training of DeBERTa encoders."""

from DeBERTa.config import ConfigError, ModelConfig, RTDConfig, TrainConfig
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
