"""Ways to compute softmax(q k^T + position scores) v, and which of them can run where (`--attention`).

| name    | what it is                                                       | where  |
| ------- | ---------------------------------------------------------------- | ------ |
| blocked | a sequence at a time, with its own backward: blocked_attention.py | CPUs  |
| eager   | plain operations on whole [B, H, L, L] tensors                   | all    |
| sdpa    | the library's fused attention; the position scores are its bias  | all    |
| flash   | package disentangled-flash 1.1.1: no [L, L] tensor at all        | CUDA   |

"auto" stands for blocked on a CPU and for sdpa elsewhere; `--attention auto` takes flash where it can run.

Shapes: B batch, L keys, M queries, H heads, D head size, R rows of the projected relative-position table.
"""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch.nn import functional as F

from DeBERTa.config import ModelConfig
from DeBERTa.model.dropout import Dropout

FLASH_VERSION = "1.1.1"  # what we call is not public, so that other versions may differ
FLASH_HEAD_SIZES = (32, 64, 128)


def choose_backend(wanted: str, config: ModelConfig, device: torch.device) -> tuple[str, str | None]:
    """What `--attention` = `wanted` means for a model on a device, and why not what was asked for, if so."""
    if wanted not in ("auto", "flash") or (wanted == "auto" and device.type != "cuda"):
        return wanted, None
    obstacle = flash_obstacle(config, device)
    if obstacle is None:
        return "flash", None
    return "sdpa", obstacle if wanted == "flash" else None


def flash_obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Why the flash kernels cannot be used; None if they can."""
    if device.type != "cuda":
        return f"its kernels run on CUDA GPUs, not on a {device.type.upper()}"
    if not config.position_terms:
        return "the model has no relative positions"
    if config.head_size not in FLASH_HEAD_SIZES:
        return f"its kernels take heads of 32, 64 or 128, not {config.head_size}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        installed = version("disentangled-flash")
    except PackageNotFoundError:
        return "the package disentangled-flash is not installed"
    if installed != FLASH_VERSION:
        return f"disentangled-flash {installed} is installed, not {FLASH_VERSION}"
    return None


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    terms: list[torch.Tensor],
    input_mask: torch.Tensor,
    dropout: Dropout,
) -> torch.Tensor:
    """Context [B, H, M, D] of scaled queries [B, H, M, D]: `terms` [B, H, M, L], `input_mask` bool [B, L]."""
    scores = sum(terms, q @ k.transpose(2, 3))
    scores = scores.masked_fill(~input_mask[:, None, None], torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return dropout(probs) @ v


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    terms: list[torch.Tensor],
    input_mask: torch.Tensor,
    dropout: Dropout,
) -> torch.Tensor:
    """The same. Padded keys get the lowest finite bias: with minus infinity a row without real keys would be NaN."""
    bias = sum(terms) if terms else q.new_zeros(()).expand(len(q), 1, 1, k.size(2))
    bias = bias.masked_fill(~input_mask[:, None, None], torch.finfo(q.dtype).min)
    p = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)


class FlashLookup(NamedTuple):
    """Where the flash kernels find a distance's row: `rows` int32 [2L - 1], from distance -(L - 1) up; `band`, the
    package's `GradientBand`, spares its backward pass atomic additions."""

    rows: torch.Tensor
    band: tuple


def flash_lookup(rows: torch.Tensor, device: torch.device) -> FlashLookup:
    """From `RelativePositions.rows` on the host, without waiting for the device."""
    from disentangled_flash.position import gradient_band

    upwards = rows.flip(0).to(torch.int32)
    band = gradient_band(upwards, torch.device("cpu"))
    slots = band.column_slots.to(device, non_blocking=True)
    return FlashLookup(upwards.to(device, non_blocking=True), band._replace(column_slots=slots))


@torch.compiler.disable  # the layer is compiled around it
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_table: torch.Tensor | None,
    query_table: torch.Tensor | None,
    lookup: FlashLookup,
    input_mask: torch.Tensor,
    p: float,
) -> torch.Tensor:
    """Context [B, L, H * D] at all positions, zero at padding; position keys and scaled queries are [H, R, D].

    Dropout takes its seed from the device's generator, so that layers can be computed again.
    """
    from disentangled_flash.position import pad_position_table
    from disentangled_flash.training._kernels import training_attention

    context = training_attention(
        q,
        k,
        v,
        pad_position_table(key_table),
        pad_position_table(query_table),
        lookup.rows,
        input_mask,
        score_scale=1.0,
        has_padding=True,
        strict_fp32=True,
        dropout_p=p,
        gradient_band=lookup.band,
    )
    return context.masked_fill(~input_mask[:, :, None], 0)
