"""PyTorch's fused attention; tests/model/test_attention.py compares it with the formula."""

import copy

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.data.batch import Batch
from DeBERTa.model.attention import DisentangledSelfAttention, Keys
from DeBERTa.ops.attention import SdpaSelfAttention
from DeBERTa.training.execution import set_execution
from tests.conftest import tiny_model
from tests.training.batches import train_config


def make(p: float) -> SdpaSelfAttention:
    return SdpaSelfAttention(ModelConfig.from_dict(tiny_model() | {"attention_probs_dropout_prob": p}))


def test_dropout_drops_probabilities_in_training_only():
    """With one real key of value 1, each output is the one probability, dropped: 0, or 1 / (1 - p)."""
    torch.manual_seed(0)
    q = k = torch.randn(2, 2, 500, 16)
    mask = torch.zeros(2, 500, dtype=torch.bool)
    mask[:, 0] = True
    keys = Keys(k, torch.ones_like(k), mask, None, None, torch.randn(2, 2, 500, 500))
    attention = make(0.25)
    out = attention.train().attend(q, keys)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    dropped = (out[..., ::16] == 0).float()
    assert abs(float(dropped.mean()) - 0.25) < 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5  # standard errors
    assert torch.equal(attention.eval().attend(q, keys), torch.ones_like(out))


@pytest.mark.parametrize("has_terms", [False, True])
def test_a_sequence_without_real_keys_is_not_nan(has_terms):
    mask = torch.tensor([[False] * 3, [True] * 3])
    x = torch.randn(2, 2, 3, 16)
    terms = torch.randn(2, 2, 3, 3) if has_terms else None
    assert torch.isfinite(make(0.0).attend(x, Keys(x, x, mask, None, None, terms))).all()


def test_scores_are_not_saved():
    """Neither table of scores [B, H, L, S], of c2p and p2c, is saved for the backward pass."""
    attention = make(0.0)
    q, table = torch.randn(2, 2, 40, 16, requires_grad=True), torch.randn(2, 32, 16, requires_grad=True)
    slots = torch.randint(0, 32, (40, 40))
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = (
            attention.compute_content_to_position(q, table, slots),
            attention.compute_position_to_content(q, table, slots),
        )
    plain = DisentangledSelfAttention
    theirs = (
        plain.compute_content_to_position(attention, q, table, slots),
        plain.compute_position_to_content(attention, q, table, slots),
    )
    assert saved
    assert (2, 2, 40, 32) not in saved
    weights = torch.randn(2, 2, 40, 40)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)
        gradients = (torch.autograd.grad((out * weights).sum(), (q, table)) for out in (mine, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("terms", ["c2p", "p2c", "p2c|c2p", "none"])
@pytest.mark.parametrize("share_att_key", [True, False])
def test_without_a_masked_token_gradients_are_those_of_the_plain_model(terms, share_att_key):
    """Zeros, not None: ranks reduce the same gradients whatever their batches are."""
    config = tiny_model() | {"pos_att_type": terms, "share_att_key": share_att_key}
    torch.manual_seed(0)
    plain = MaskedLanguageModel(ModelConfig.from_dict(config))
    fused = copy.deepcopy(plain)
    set_execution(fused, train_config(attention="sdpa"), torch.device("cpu"))
    ids, labels = torch.randint(5, 50, (2, 8)), torch.zeros(2, 8, dtype=torch.long)
    batch = Batch.from_tensors(ids, torch.ones(2, 8, dtype=torch.bool), labels, torch.rand(2, 8).double())
    gradients = []
    for model in (plain, fused):
        model.compute_masked_loss(batch, False).loss.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (expected is None), name
        assert found is None or torch.equal(found, expected), name
