"""The encoder as an ONNX file, with dynamic batch size and length.

Needs onnx and onnxscript (an extra).
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.errors import ConfigError
from DeBERTa.model.attention import RelativePositions, map_to_slots
from DeBERTa.model.encoder import Deberta, Encoder

MAX_BYTES = 1_900_000_000  # of weights in the file itself; ONNX files end at 2 GiB
EXAMPLE = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in range(2))
DYNAMIC_SHAPES = ({0: "batch", 1: "length"},) * 2


class TracedEncoder(Encoder):
    """Encoder whose relative positions are tensor operations.

    None of their values is read on the host.
    """

    def compute_relative_positions(self, length: int) -> RelativePositions | None:
        """Return all rows of the table, and the slots of `length` positions."""
        if not self.config.position_terms:
            return None
        table = self.rel_embeddings.weight
        if self.has_position_norm:
            table = self.LayerNorm(table)
        tokens = torch.arange(length, device=table.device)
        # Distances from max_distance on share a row. A lookup in place of logarithms gives the same slots.
        limit = self.config.max_distance
        slots = map_to_slots(torch.arange(-limit, limit + 1), self.config).to(table.device)
        distances = (tokens[:, None] - tokens).clamp(-limit, limit)
        return RelativePositions(table, slots, slots[distances + limit])


class OnnxEncoder(nn.Module):
    """The inputs and the output of the ONNX file."""

    def __init__(self, deberta: Deberta) -> None:
        super().__init__()
        self.deberta = deberta

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state [B, L, h] of two int64 [B, L]."""
        return self.deberta.compute_last_hidden_state(input_ids, attention_mask)


def build_encoder(weights: dict[str, torch.Tensor], config: ModelConfig) -> OnnxEncoder:
    """Return the encoder of an exported model for `torch.export`.

    Batch size and length are dynamic.
    """
    encoder = OnnxEncoder(Deberta(config, "nes"))
    encoder.load_state_dict({name: t for name, t in weights.items() if name.startswith("deberta.")})
    encoder.deberta.encoder.__class__ = TracedEncoder
    return encoder.eval()


def require_onnx() -> None:
    """Raise `ConfigError` where the packages are missing."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--onnx needs the package {name}: pip install onnx onnxscript")


def write_encoder(weights: dict[str, torch.Tensor], config: ModelConfig, path: Path) -> None:
    """Write `input_ids, attention_mask -> last_hidden_state` of an exported model."""
    encoder = build_encoder(weights, config)
    for noisy in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            EXAMPLE,
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes=DYNAMIC_SHAPES,
            dynamo=True,
            external_data=size > MAX_BYTES,
            verbose=False,
        )
