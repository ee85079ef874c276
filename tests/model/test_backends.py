"""Which attention `--attention` means, and what only the library's has: dropout of its own."""

import importlib.util

import pytest
import torch

from DeBERTa import ModelConfig
from DeBERTa.model.backends import choose_backend, sdpa_attention
from DeBERTa.model.dropout import Dropout
from tests.conftest import tiny_model

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


def test_flash_needs_its_packages(tmp_path, monkeypatch):
    """With one package missing it is named; with both there, flash is what runs."""
    config = ModelConfig.from_dict(tiny_model() | HEADS_OF_32)
    absent = [m for m in ("triton", "disentangled_flash") if importlib.util.find_spec(m) is None]
    monkeypatch.syspath_prepend(tmp_path)
    for module in absent:
        package = module.replace("_", "-")
        assert choose_backend("flash", config, CUDA) == ("sdpa", f"the package {package} is not installed")
        assert choose_backend("auto", config, CUDA) == ("sdpa", None)
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
        importlib.invalidate_caches()
    assert choose_backend("flash", config, CUDA) == choose_backend("auto", config, CUDA) == ("flash", None)


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
    assert abs(float(dropped) - 0.25) < 4 * (0.25 * 0.75 / out[..., 0].numel()) ** 0.5  # 4 standard deviations
    assert torch.equal(sdpa_attention(q, k, torch.ones_like(k), terms, mask, dropout.eval()), torch.ones_like(out))


def test_a_sequence_without_real_keys_is_not_nan():
    mask = torch.tensor([[False] * 3, [True] * 3])
    x = torch.randn(2, 2, 3, 4)
    for terms in ([], [torch.randn(2, 2, 3, 3)]):
        assert torch.isfinite(sdpa_attention(x, x, x, terms, mask, Dropout(0.0))).all()
