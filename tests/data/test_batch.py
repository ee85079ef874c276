"""Batches: where the masked tokens are, micro-batches that add up to the batch."""

import torch

from DeBERTa.data.batch import MaskedPositions
from tests.training.batches import random_batch


def test_masked_positions():
    labels = torch.tensor([[0, 5, 0, 7, 0], [0, 0, 0, 0, 0], [0, 0, 6, 0, 0]])
    positions, valid_index, flat_index = MaskedPositions.from_labels(labels)
    assert positions.shape == (3, 2)
    assert positions[0].tolist() == [1, 3]
    assert positions[2, 0] == 2
    assert valid_index.tolist() == [0, 1, 4]
    assert labels.flatten()[flat_index].tolist() == [5, 7, 6]
    without_masks = MaskedPositions.from_labels(torch.zeros_like(labels))
    assert [len(tensor.flatten()) for tensor in without_masks] == [0, 0, 0]


def test_micro_batches_add_up():
    batch = random_batch(rows=24)
    micro_batches = batch.split(4)
    assert [len(micro_batch.input_ids) for micro_batch in micro_batches] == [6] * 4
    assert torch.equal(torch.cat([micro_batch.labels for micro_batch in micro_batches]), batch.labels)
    assert sum(micro_batch.masked_tokens for micro_batch in micro_batches) == batch.masked_tokens
    assert sum(micro_batch.real_tokens for micro_batch in micro_batches) == batch.real_tokens


def test_moving_to_a_device_keeps_everything():
    batch = random_batch()
    moved = batch.to(torch.device("cpu"))
    for name in ("input_ids", "input_mask", "labels", "uniforms"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert all(torch.equal(*pair) for pair in zip(moved.masked, batch.masked, strict=True))
    assert (moved.masked_tokens, moved.real_tokens) == (batch.masked_tokens, batch.real_tokens)
