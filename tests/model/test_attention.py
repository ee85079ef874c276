"""The fast paths of attention against the formula pair by pair: values and all gradients."""

from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.model.attention import map_to_slots
from DeBERTa.model.encoder import Encoder
from DeBERTa.ops.cpu import attention as blocked_attention
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.attention import BlockedAttention, view_distances
from DeBERTa.ops.dropout import draw_keep_mask
from tests.conftest import tiny_model
from tests.model.reference_attention import reference_context, slot
from tests.training.batches import random_batch

LENGTH = 20
VARIANTS = [
    {"pos_att_type": terms, "position_buckets": buckets, "share_att_key": shared}
    for terms in ("c2p", "p2c", "p2c|c2p", "none")
    for buckets, shared in ((8, True), (-1, True), (8, False))
]


def make(variant: dict) -> tuple[Encoder, ModelConfig]:
    torch.manual_seed(0)
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
    config = ModelConfig.from_dict(tiny_model() | {"max_position_embeddings": 16} | plain | variant)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return encoder, config


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, 13:], mask[2, 1:] = False, False
    return (
        torch.randn(3, LENGTH, 32, requires_grad=True),
        torch.randn(3, LENGTH, 32, requires_grad=True),
        mask,
    )


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values to 1e-5, gradients to 1e-5 of the largest one: those of key biases are sums that cancel."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    actual, expected = (
        torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * largest, rtol=0)


def keys_of(attention, hidden, mask, positions):
    return attention.with_positions(
        *attention.project(hidden, attention.key_proj, attention.value_proj), mask, positions
    )


@pytest.mark.parametrize("path", ["whole", "blocks", "whole, torch", "blocks, torch", "eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_position(variant, path, monkeypatch):
    if path.endswith("torch"):
        monkeypatch.setattr(kernels, "find", lambda *_: None)
    encoder, config = make(variant)
    attention = encoder.layer[0].attention.self
    hidden, queries, mask = inputs()
    (q,) = attention.project(queries, attention.query_proj)
    keys = keys_of(attention, hidden, mask, encoder.relative_positions(LENGTH))
    if path.startswith("blocks"):
        monkeypatch.setattr(blocked_attention, "FLOAT32_ROWS", 8)  # the last block is smaller
    attention.backend = path if path in ("eager", "sdpa") else "auto"
    ours = attention.attend(q, keys)
    table = encoder.LayerNorm(encoder.rel_embeddings.weight)
    theirs = reference_context(attention, queries, hidden, mask, table, config)
    assert torch.count_nonzero(ours[~mask]) == 0
    assert_same_gradients(
        ours, theirs, [hidden, queries, *attention.parameters(), encoder.rel_embeddings.weight]
    )


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_selected_positions(variant, backend):
    encoder, config = make(variant)
    attention = encoder.layer[0].attention.self
    attention.backend = backend
    hidden, queries, mask = inputs()
    at = torch.tensor([[2, 5, 19], [0, 12, 3], [0, 0, 0]])
    rows = torch.arange(3)[:, None]
    keys = keys_of(attention, hidden, mask, encoder.relative_positions(LENGTH))
    ours = attention.selected(queries[rows, at], at, keys, attention.selected_position_keys(keys, at))
    table = encoder.LayerNorm(encoder.rel_embeddings.weight)
    theirs = reference_context(attention, queries, hidden, mask, table, config)[rows, at]
    assert_same_gradients(
        ours, theirs, [hidden, queries, *attention.parameters(), encoder.rel_embeddings.weight]
    )


@pytest.mark.parametrize("rows", [256, 8])
def test_dropout_on_probabilities(rows, way, monkeypatch):
    """With the masks known, value and gradients are those of the formula with dropped, scaled probabilities."""
    monkeypatch.setattr(blocked_attention, "FLOAT32_ROWS", rows)
    encoder, config = make({"attention_probs_dropout_prob": 0.3})
    attention = encoder.layer[0].attention.self.train()
    hidden, queries, mask = inputs()
    monkeypatch.setattr(blocked_attention, "draw_seed", lambda: 12345)
    (q,) = attention.project(queries, attention.query_proj)
    ours = attention.attend(q, keys_of(attention, hidden, mask, encoder.relative_positions(LENGTH)))
    table = encoder.LayerNorm(encoder.rel_embeddings.weight)
    kept = draw_keep_mask((3, attention.num_heads, LENGTH, LENGTH), 12345, 0.3)
    assert 0.6 < kept.float().mean() < 0.8
    theirs = reference_context(attention, queries, hidden, mask, table, config, kept / 0.7)
    assert_same_gradients(
        ours, theirs, [hidden, queries, *attention.parameters(), encoder.rel_embeddings.weight]
    )


FUSED = [(32, 32), (64, 64), (96, 64), (128, 32), (160, 64), (544, 64), (64, 128)]


@pytest.mark.parametrize(("length", "size"), [(length, 8) for length in (1, 15, 16, 17, 63, 300)] + FUSED)
@pytest.mark.parametrize("tables", ["both", "c2p", "p2c", "none"])
def test_kernels_against_torch(length, size, tables, monkeypatch):
    """Lengths around those of tiles and blocks, with dropout."""
    mask = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
    compare_with_torch(mask, size, tables, 0.2, monkeypatch)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_kernels_against_torch_in_larger_batches(size, p, monkeypatch):
    """More sequences than one thread adds up gradients of tables for; masks with holes, and of nothing but padding."""
    mask = torch.rand(9, 64, generator=torch.Generator().manual_seed(5)) < 0.8
    mask[0], mask[7] = True, False
    compare_with_torch(mask, size, "both", p, monkeypatch)


def compare_with_torch(mask, size, tables, p, monkeypatch):
    """Float32 to 1e-5, bfloat16 no further off than torch."""
    torch.manual_seed(6)
    batch, length = mask.shape
    shapes = ((batch, 3, length, size),) * 3 + ((3, 2 * length - 1, size),) * 2
    inputs = [torch.randn(shape).div(size**0.25).bfloat16() for shape in shapes]
    used = [True] * 3 + [tables in ("both", "c2p"), tables in ("both", "p2c")]
    weights = torch.randn(batch, length, 3, size).bfloat16()
    find = kernels.find
    assert library.find_obstacle() is None, "the tests need g++"

    def results(dtype, found):
        monkeypatch.setattr(kernels, "find", found)
        torch.manual_seed(7)
        leaves = [x.to(dtype).requires_grad_() if use else None for x, use in zip(inputs, used, strict=True)]
        context = BlockedAttention.apply(*leaves, mask, p)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [context.detach(), *torch.autograd.grad(context, wanted, weights.to(dtype))]

    runs = [results(dtype, f) for dtype in (torch.float32, torch.bfloat16) for f in (find, lambda *_: None)]
    for ours, theirs, ours_low, theirs_low in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        error, usual = (float((low.float() - theirs).norm()) for low in (ours_low, theirs_low))
        assert error <= 1.1 * usual + 1e-6


def test_fused_where_the_processor_can(monkeypatch):
    """Sizes that the fused kernels are made for take them, where there is AMX; others, and other types, do not."""
    called, find = [], kernels.find

    def recorded(name, *tensors):
        called.append((name, kernel := find(name, *tensors)))
        return kernel

    monkeypatch.setattr(kernels, "find", recorded)
    flags = Path("/proc/cpuinfo").read_text()
    for length, size, dtype in (
        (64, 32, torch.bfloat16),
        (60, 32, torch.bfloat16),
        (64, 16, torch.bfloat16),
        (64, 32, torch.float32),
    ):
        called.clear()
        q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, length, dtype=torch.bool)
        BlockedAttention.apply(q, k, v, None, None, mask, 0.0).float().sum().backward()
        fused = [name for name, kernel in called if kernel is not None and name.startswith("attention")]
        fits = (length, size, dtype) == (64, 32, torch.bfloat16)
        assert fused == (["attention", "attention_gradients"] if fits and "amx_bf16" in flags else [])


def test_any_number_of_threads():
    """One, two, and more than there are heads: the same bits."""
    found = []
    for threads in (1, 2, 7):
        torch.manual_seed(9)
        inputs = [torch.randn(6, 2, 96, 64) for _ in range(3)] + [torch.randn(2, 191, 64) for _ in range(2)]
        inputs = [x.div(3).bfloat16().requires_grad_() for x in inputs]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        context = BlockedAttention.apply(*inputs, torch.ones(6, 96, dtype=torch.bool), 0.1)
        found.append([context, *torch.autograd.grad(context.float().square().sum(), inputs)])
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize(("length", "size", "dtype"), [(20, 8, torch.float32), (64, 32, torch.bfloat16)])
def test_not_a_number_stays_one(length, size, dtype, way):
    """A query that is not finite makes its row of the context so, and no other."""
    torch.manual_seed(8)
    q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype)
    tables = torch.randn(2, 2, 2 * length - 1, size, dtype=dtype)
    for value in (float("nan"), float("inf")):
        q[0, 1, 5, 3] = value
        context = BlockedAttention.apply(q, k, v, *tables, torch.ones(1, length, dtype=torch.bool), 0.0)
        assert context[0, 5, 1].isnan().all()
        assert context.isfinite().sum() == (2 * length - 1) * size


@pytest.mark.parametrize(("length", "size", "dtype"), [(20, 8, torch.float32), (64, 32, torch.bfloat16)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_padding_is_not_looked_at(length, size, dtype, value, way):
    """A key that is not finite, at a padded position, changes nothing."""
    torch.manual_seed(10)
    q, k, v = torch.randn(3, 1, 2, length, size, dtype=dtype)
    tables = torch.randn(2, 2, 2 * length - 1, size, dtype=dtype)
    mask = torch.arange(length)[None] < length - 4
    expected = BlockedAttention.apply(q, k, v, *tables, mask, 0.0)
    k[0, 1, -2] = value
    assert torch.equal(BlockedAttention.apply(q, k, v, *tables, mask, 0.0), expected)


@pytest.mark.parametrize(("length", "size", "dtype"), [(20, 8, torch.float32), (64, 32, torch.bfloat16)])
def test_gradients_that_are_not_finite_are_told(length, size, dtype, way):
    """A query that is not finite, whatever its sign, leaves no finite gradient of the values it attends to."""
    torch.manual_seed(11)
    for value in (float("nan"), float("inf"), -float("inf")):
        leaves = [torch.randn(1, 1, length, size, dtype=dtype) for _ in range(3)]
        leaves[0][0, 0, 5] = value
        leaves = [leaf.requires_grad_() for leaf in leaves]
        context = BlockedAttention.apply(*leaves, None, None, torch.ones(1, length, dtype=torch.bool), 0.0)
        (dv,) = torch.autograd.grad(context.float().square().sum(), leaves[2:])
        assert dv.isnan().all()


def test_gradient_against_finite_differences():
    torch.manual_seed(3)
    shapes = ((2, 2, 5, 3),) * 3 + ((2, 9, 3),) * 2
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.autograd.gradcheck(lambda *t: BlockedAttention.apply(*t, mask, 0.0), tensors)


def test_view_distances():
    product = torch.arange(10 + 2 * 4 * 7)[10:].view(2, 4, 7)
    view = view_distances(product, 10)
    for row in range(4):
        for column in range(4):
            assert torch.equal(view[:, row, column], product[:, row, 3 - row + column])


@pytest.mark.parametrize(("buckets", "positions"), [(256, 512), (16, 64), (8, 24), (-1, 12), (2, 64), (6, 5)])
def test_slots(buckets, positions):
    """All distances, within and beyond the table."""
    values = tiny_model() | {"position_buckets": buckets, "max_relative_positions": positions}
    config = ModelConfig.from_dict(values)
    distances = torch.arange(-2 * positions, 2 * positions + 1)
    expected = [slot(int(distance), config) for distance in distances]
    assert map_to_slots(distances, config).tolist() == expected


def test_last_layer_at_masked_positions_only():
    """The decoder equals two applications of the whole last layer, read at the masked positions."""
    torch.manual_seed(4)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"initializer_range": 0.3})).eval()
    batch = random_batch()
    words = model.deberta.embeddings.word_embeddings(batch.input_ids)
    ours = model.lm_predictions.decode(model.deberta, words, batch.input_ids, batch.input_mask, batch.masked)

    out = model.deberta(batch.input_ids, batch.input_mask)
    positions = model.deberta.encoder.relative_positions(32)
    layer = model.deberta.encoder.layer[-1]
    attention = layer.attention.self
    keys = keys_of(attention, out.hidden_states[-2], batch.input_mask > 0, positions)
    queries = out.hidden_states[-2] + model.deberta.embeddings.position_embeddings.weight[:32]
    for _ in range(2):
        queries = layer.finish(
            attention.attend(*attention.project(queries, attention.query_proj), keys), queries
        )
    torch.testing.assert_close(ours, queries[batch.labels > 0], atol=1e-5, rtol=1e-5)


def test_dropout_on_positions_is_drawn_in_each_layer():
    """Each layer drops other elements of the relative-position table, and only in training."""
    torch.manual_seed(5)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"hidden_dropout_prob": 0.4}))
    tables = []
    for layer in model.deberta.encoder.layer:
        layer.attention.self.position_dropout.register_forward_hook(
            lambda _m, _i, out: tables.append(out.detach())
        )
    batch = random_batch()
    model.deberta(batch.input_ids, batch.input_mask)
    first, second = (table == 0 for table in tables)
    assert 0.3 < first.float().mean() < 0.5 and not torch.equal(first, second)
    model.eval().deberta(batch.input_ids, batch.input_mask)
    assert torch.equal(tables[2], tables[3]) and torch.count_nonzero(tables[2] == 0) == 0
