"""Every path of attention against the formula pair by pair: values and all gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.model.attention import map_to_slots
from DeBERTa.model.encoder import Encoder
from tests.conftest import select_path, tiny_model
from tests.model.reference_attention import compute_context, compute_slot
from tests.training.batches import random_batch

LENGTH, SEED = 20, 12345
LONG = 150  # more rows than a block has in float32
VARIANTS = [
    {"pos_att_type": terms, "position_buckets": buckets, "share_att_key": shared}
    for terms in ("c2p", "p2c", "p2c|c2p", "none")
    for buckets, shared in ((8, True), (-1, True), (8, False))
]
CASES = [(variant, LENGTH) for variant in VARIANTS]
CASES += [(variant, LONG) for variant in VARIANTS if variant["pos_att_type"] == "p2c|c2p"]
CASES += [({"pos_att_type": "p2c|c2p", "position_buckets": -1}, 12)]  # all distances below the longest, 16
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def make(variant: dict, path: str) -> tuple[Encoder, ModelConfig]:
    """Return an encoder of one layer that computes as PATHS[path] says, and its config."""
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(DROPOUT, 0.0)
    values = tiny_model() | {"max_position_embeddings": 16, "num_hidden_layers": 1} | no_dropout | variant
    config = ModelConfig.from_dict(values)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return select_path(encoder, path), config


def make_inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, queries [B, L, h], and a mask: a full sequence, a shorter one, one of a token."""
    torch.manual_seed(1)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 13:], mask[2, 1:] = False, False
    hidden, queries = (torch.randn(3, length, 32, requires_grad=True) for _ in range(2))
    return hidden, queries, mask


def normalize_table(encoder: Encoder) -> torch.Tensor:
    """Return the relative-position table [S, h] that the formula reads."""
    return encoder.LayerNorm(encoder.rel_embeddings.weight)


def list_leaves(encoder: Encoder, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return everything that attention differentiates."""
    attention = encoder.layer[0].attention.self
    return [*inputs, *attention.parameters(), *encoder.LayerNorm.parameters(), encoder.rel_embeddings.weight]


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Compare to 1e-5, gradients relative to the largest one: those of key biases are sums that cancel."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    actual, expected = (
        torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize(("variant", "length"), CASES)
def test_every_position(variant, length, path):
    encoder, config = make(variant, path)
    attention = encoder.layer[0].attention.self
    hidden, _, mask = make_inputs(length)
    ours = attention(hidden, mask, encoder.compute_relative_positions(length))
    theirs = compute_context(attention, hidden, hidden, mask, normalize_table(encoder), config)
    assert torch.count_nonzero(ours[~mask]) == 0
    assert_same_gradients(ours, theirs, list_leaves(encoder, hidden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_selected_positions(variant, path):
    encoder, config = make(variant, path)
    attention = encoder.layer[0].attention.self
    hidden, queries, mask = make_inputs()
    selected = torch.tensor([[2, 5, 19], [0, 12, 3], [0, 0, 0]])
    rows = torch.arange(3)[:, None]
    keys = attention.project_keys(hidden, mask, encoder.compute_relative_positions(LENGTH), selected)
    ours = attention.attend(attention.project_queries(queries[rows, selected]), keys)
    theirs = compute_context(attention, queries, hidden, mask, normalize_table(encoder), config)
    assert_same_gradients(ours, theirs[rows, selected], list_leaves(encoder, hidden, queries))


def draw_scaled_mask(shape: tuple[int, ...], p: float, path: str) -> torch.Tensor:
    """Return what the next dropout of `path` multiplies by: 0 where dropped, else 1 / (1 - p)."""
    is_position_table = len(shape) == 2
    if path == "plain" or (path == "sdpa" and not is_position_table):  # sdpa drops probabilities itself
        return F.dropout(torch.ones(shape), p)
    from DeBERTa.ops.dropout import draw_keep_mask, draw_seed

    return draw_keep_mask(shape, draw_seed(), p) / (1 - p)


@pytest.mark.parametrize("length", [LENGTH, LONG])
@pytest.mark.parametrize("variant", [VARIANTS[6], VARIANTS[8]])
def test_dropout_at_every_position(variant, length, path):
    """With equal masks, on the position table and the probabilities, paths and formula agree."""
    encoder, config = make(variant | DROPOUT, path)
    attention = encoder.layer[0].attention.self.train()
    hidden, _, mask = make_inputs(length)
    torch.manual_seed(SEED)
    ours = attention(hidden, mask, encoder.compute_relative_positions(length))
    torch.manual_seed(SEED)
    positions = encoder.compute_relative_positions(length)
    table_mask = draw_scaled_mask(tuple(positions.table.shape), 0.2, path)
    keep = draw_scaled_mask((3, attention.num_heads, length, length), 0.3, path)
    assert 0.6 < keep.count_nonzero() / keep.numel() < 0.8
    table = normalize_table(encoder) * place_rows(table_mask, encoder, length)
    theirs = compute_context(attention, hidden, hidden, mask, table, config, keep)
    assert_same_gradients(ours, theirs, list_leaves(encoder, hidden))


@pytest.mark.parametrize("variant", [VARIANTS[6], VARIANTS[8]])
def test_dropout_at_selected_positions(variant, path):
    encoder, config = make(variant | DROPOUT, path)
    attention = encoder.layer[0].attention.self.train()
    hidden, queries, mask = make_inputs()
    selected = torch.tensor([[2, 5, 19], [0, 12, 3], [0, 0, 0]])
    rows = torch.arange(3)[:, None]
    torch.manual_seed(SEED)
    positions = encoder.compute_relative_positions(LENGTH)
    keys = attention.project_keys(hidden, mask, positions, selected)
    ours = attention.attend(attention.project_queries(queries[rows, selected]), keys)
    torch.manual_seed(SEED)
    table_mask = draw_scaled_mask(tuple(positions.table.shape), 0.2, path)
    drop = torch.ones(3, attention.num_heads, LENGTH, LENGTH)
    scaled = draw_scaled_mask((3, attention.num_heads, 3, LENGTH), 0.3, path)
    for column in range(3):
        drop[torch.arange(3), :, selected[:, column]] = scaled[:, :, column]
    # The sequence of one token is selected three times, with another mask each time.
    hidden_rows, once = [0, 1], selected[:2]
    table = normalize_table(encoder) * place_rows(table_mask, encoder, LENGTH)
    theirs = compute_context(attention, queries, hidden, mask, table, config, drop)
    assert_same_gradients(
        ours[hidden_rows], theirs[rows[hidden_rows], once], list_leaves(encoder, hidden, queries)
    )


def place_rows(mask: torch.Tensor, encoder: Encoder, length: int) -> torch.Tensor:
    """Return `mask` [rows that occur, h] as one of the full table [S, h], with ones elsewhere."""
    slots = map_to_slots(torch.arange(1 - length, length), encoder.config)
    full = torch.ones_like(encoder.rel_embeddings.weight)
    first = slots.min() // encoder.table_alignment * encoder.table_alignment
    full[first : first + len(mask)] = mask
    return full


def test_a_sequence_without_real_tokens_is_finite(path):
    encoder, _ = make(VARIANTS[6], path)
    hidden, _, mask = make_inputs()
    mask[1] = False
    context = encoder.layer[0].attention.self(hidden, mask, encoder.compute_relative_positions(LENGTH))
    (gradient,) = torch.autograd.grad(context.square().sum(), hidden)
    assert context.isfinite().all()
    assert gradient.isfinite().all()
    assert torch.count_nonzero(gradient[1]) == 0


@pytest.mark.parametrize(("buckets", "positions"), [(256, 512), (16, 64), (8, 24), (-1, 12), (2, 64), (6, 5)])
def test_slots(buckets, positions):
    """All distances, within and beyond the table."""
    values = tiny_model() | {"position_buckets": buckets, "max_relative_positions": positions}
    config = ModelConfig.from_dict(values)
    distances = torch.arange(-2 * positions, 2 * positions + 1)
    expected = [compute_slot(int(distance), config) for distance in distances]
    assert map_to_slots(distances, config).tolist() == expected


def test_dropout_on_positions_is_drawn_in_each_layer(path):
    """Each layer drops other elements of the relative-position table, and only in training."""
    torch.manual_seed(5)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"hidden_dropout_prob": 0.4}))
    select_path(model, path)
    tables = []

    def record(_module: nn.Module, _inputs: tuple, out: torch.Tensor) -> None:
        tables.append(out.detach())

    for layer in model.deberta.encoder.layer:
        layer.attention.self.position_dropout.register_forward_hook(record)
    batch = random_batch()
    model.deberta(batch.input_ids, batch.input_mask)
    first, second = (table == 0 for table in tables)
    assert 0.3 < first.float().mean() < 0.5
    assert not torch.equal(first, second)
    model.eval().deberta(batch.input_ids, batch.input_mask)
    assert torch.equal(tables[2], tables[3])
    assert torch.count_nonzero(tables[2] == 0) == 0
