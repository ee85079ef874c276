"""Which attention `--attention` means, what only the library's has, and how the flash kernels are called."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa import ModelConfig
from DeBERTa.model.backends import choose_backend, sdpa_attention
from DeBERTa.model.dropout import Dropout
from tests.conftest import tiny_model
from tests.model.reference_attention import reference_context
from tests.model.test_attention import LENGTH, VARIANTS, assert_same_gradients, inputs, make

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS_OF_32 = {"hidden_size": 64}


@pytest.mark.parametrize(
    ("wanted", "device", "change", "expected", "reason"),
    [
        ("auto", CPU, {}, "auto", None),
        ("eager", CPU, {}, "eager", None),
        ("sdpa", CUDA, {}, "sdpa", None),
        ("flash", CPU, HEADS_OF_32, "sdpa", "its kernels run on CUDA GPUs, not on a CPU"),
        ("flash", CUDA, {}, "sdpa", "its kernels take heads of 32, 64 or 128, not 16"),
        ("flash", CUDA, {"relative_attention": False}, "sdpa", "the model has no relative positions"),
        ("auto", CUDA, {}, "sdpa", None),
    ],
)
def test_choice(wanted, device, change, expected, reason):
    config = ModelConfig.from_dict(tiny_model() | change)
    assert choose_backend(wanted, config, device) == (expected, reason)


def install(folder: Path, version: str) -> None:
    """A stand-in for the package disentangled-flash, and for Triton, where Python finds them."""
    for module in ("triton", "disentangled_flash", "disentangled_flash/training"):
        (folder / module).mkdir(parents=True, exist_ok=True)
        (folder / module / "__init__.py").touch()
    (folder / "disentangled_flash" / "position.py").write_text(POSITION)
    (folder / "disentangled_flash" / "training" / "_kernels.py").write_text(KERNELS)
    metadata = folder / f"disentangled_flash-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: disentangled-flash\nVersion: {version}\n"
    )
    importlib.invalidate_caches()


# What the source of version 1.1.1 computes (kernel.py, position.py), by plain operations: i is the query, j the key.
POSITION = """
from typing import NamedTuple
import torch

class GradientBand(NamedTuple):
    low: int
    high: int
    column_slots: torch.Tensor

def gradient_band(delta_to_local, device):
    return GradientBand(0, 1, delta_to_local.long().to(device))

def pad_position_table(table):
    return None if table is None else torch.nn.functional.pad(table, (0, 0, 0, -table.size(-2) % 8))
"""
KERNELS = """
import torch

def training_attention(
    query, key, value, pos_key, pos_query, delta_to_local, attention_mask,
    *, score_scale, has_padding, strict_fp32, dropout_p=0.0, gradient_band=None,
):
    assert delta_to_local.dtype == torch.int32 and delta_to_local.is_contiguous() and has_padding
    assert attention_mask.dtype == torch.bool and attention_mask.is_contiguous() and dropout_p == 0
    length = query.size(2)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    slot = delta_to_local.long()[i - j + length - 1]
    scores = query @ key.transpose(2, 3)
    if pos_key is not None:
        scores = scores + (query @ pos_key.transpose(1, 2))[:, :, i, slot]
    if pos_query is not None:
        scores = scores + (key @ pos_query.transpose(1, 2))[:, :, j, slot]
    pairs = attention_mask[:, None, :, None] & attention_mask[:, None, None]
    scores = (scores * score_scale).masked_fill(~pairs, float("-inf"))
    scores = scores.masked_fill(~attention_mask[:, None, :, None], 0)  # a padded query sees all keys alike
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).flatten(2)
"""


def test_flash_needs_its_packages(tmp_path, monkeypatch):
    """What is missing is named; with all there, flash is what runs, asked for or not."""
    config = ModelConfig.from_dict(tiny_model() | HEADS_OF_32)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert choose_backend("flash", config, CUDA) == ("sdpa", "the package triton is not installed")
    (tmp_path / "triton").mkdir()
    importlib.invalidate_caches()
    assert choose_backend("flash", config, CUDA) == (
        "sdpa",
        "the package disentangled-flash is not installed",
    )
    assert choose_backend("auto", config, CUDA) == ("sdpa", None)
    install(tmp_path, "1.1.1")
    assert choose_backend("flash", config, CUDA) == choose_backend("auto", config, CUDA) == ("flash", None)
    shutil.rmtree(tmp_path / "disentangled_flash-1.1.1.dist-info")
    install(tmp_path, "2.0.0")
    assert choose_backend("flash", config, CUDA) == (
        "sdpa",
        "disentangled-flash 2.0.0 is installed, not 1.1.1",
    )


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant["pos_att_type"] != "none"])
def test_flash_is_called_as_its_source_asks(variant, tmp_path, monkeypatch):
    """Order of distances, scales and masks: values and all gradients are those of the formula."""
    install(tmp_path, "1.1.1")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("", ".position", ".training", ".training._kernels"):  # nothing stays imported
        monkeypatch.delitem(sys.modules, f"disentangled_flash{name}", raising=False)
    encoder, config = make(variant)
    attention = encoder.layer[0].attention.self
    attention.backend = "flash"
    hidden, _, mask = inputs()
    ours = attention(hidden, mask, encoder.relative_positions(LENGTH))
    table = encoder.LayerNorm(encoder.rel_embeddings.weight)
    theirs = reference_context(attention, hidden, hidden, mask, table, config)
    assert torch.count_nonzero(ours[~mask]) == 0
    assert_same_gradients(ours, theirs, [hidden, *attention.parameters(), encoder.rel_embeddings.weight])


def test_dropout_of_the_library_drops_probabilities_in_training_only():
    """With one real key of value 1, each output is the one probability, dropped: 0, or 1 / (1 - p)."""
    torch.manual_seed(0)
    q = k = torch.randn(2, 4, 500, 8)
    mask = torch.zeros(2, 500, dtype=torch.bool)
    mask[:, 0] = True
    terms, dropout = [torch.randn(2, 4, 500, 500)], Dropout(0.25)
    out = sdpa_attention(q, k, torch.ones_like(k), terms, mask, dropout.train())
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    dropped = (out[..., 0] == 0).float().mean()
    assert (
        abs(float(dropped) - 0.25) < 4 * (0.25 * 0.75 / out[..., 0].numel()) ** 0.5
    )  # 4 standard deviations
    assert torch.equal(
        sdpa_attention(q, k, torch.ones_like(k), terms, mask, dropout.eval()), torch.ones_like(out)
    )


def test_a_sequence_without_real_keys_is_not_nan():
    mask = torch.tensor([[False] * 3, [True] * 3])
    x = torch.randn(2, 2, 3, 4)
    for terms in ([], [torch.randn(2, 2, 3, 3)]):
        assert torch.isfinite(sdpa_attention(x, x, x, terms, mask, Dropout(0.0))).all()
