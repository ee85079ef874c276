"""Batches: a pure function of (seed, step, rank); every line once per epoch."""

import dataclasses
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from DeBERTa.data.dataset import (
    BatchPlan,
    EvaluationBatches,
    Replay,
    TrainingBatches,
    derive_step_seed,
)
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import get_store_path, open_store
from DeBERTa.errors import DamagedStoreError

PLAN = BatchPlan(seed=7, batch_size=24, max_seq_length=64)


@pytest.fixture(scope="module")
def store(prepared, tokenizer):
    return open_store(prepared / "train.txt", tokenizer, max_tokens=62)


@pytest.fixture(scope="module")
def masker(tokenizer):
    return Masker(tokenizer, 3, is_always_masked=False)


def open_training(store, tokenizer, masker, **changes) -> TrainingBatches:
    return TrainingBatches(store, tokenizer, masker, dataclasses.replace(PLAN, **changes))


def restore_originals(batch) -> torch.Tensor:
    return torch.where(batch.labels > 0, batch.labels, batch.input_ids)


def test_layout(store, tokenizer, masker):
    batches = open_training(store, tokenizer, masker)
    batch = batches[3]
    for row, line in zip(restore_originals(batch), batches.select_lines(3), strict=True):
        assert (row[0], row[63]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert row[1:63].tolist() == store[line].tolist()
    assert (batch.input_ids.dtype, batch.input_mask.dtype) == (torch.int32, torch.bool)
    assert batch.masked_tokens == (batch.labels > 0).sum()
    assert batch.real_tokens == batch.input_mask.sum() == 24 * 64


def test_every_line_once_per_epoch_even_across_batches(store, tokenizer, masker):
    batches = open_training(store, tokenizer, masker, batch_size=32)  # 600 lines: epochs end within batches
    seen = np.concatenate([batches.select_lines(step) for step in range(75)])
    epochs = seen[:2400].reshape(4, 600)
    for epoch in epochs:
        assert sorted(epoch) == list(range(600))
    assert (epochs[0] != epochs[1]).any()


def test_pure_function_of_seed_and_step(store, tokenizer, masker):
    forwards, backwards = open_training(store, tokenizer, masker), open_training(store, tokenizer, masker)
    first = [forwards[step] for step in (0, 30, 60)]
    again = [backwards[step] for step in (60, 30, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
    other_seed = open_training(store, tokenizer, masker, seed=8)[0]
    assert not torch.equal(restore_originals(first[0]), restore_originals(other_seed))


def test_a_line_is_masked_again_in_each_epoch(store, tokenizer, masker):
    batches = open_training(store, tokenizer, masker)  # 25 batches of 24 are one epoch
    first_epoch = {}
    for step in range(25):
        first_epoch |= dict(zip(batches.select_lines(step).tolist(), batches[step].labels, strict=True))
    second_epoch = zip(batches.select_lines(25).tolist(), batches[25].labels, strict=True)
    assert all(not torch.equal(first_epoch[line], labels) for line, labels in second_epoch)


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_shard_the_same_global_batch(store, tokenizer, masker, world_size):
    batch = open_training(store, tokenizer, masker)[11]
    shards = [
        open_training(store, tokenizer, masker, rank=r, world_size=world_size)[11] for r in range(world_size)
    ]
    for name in ("input_ids", "input_mask", "labels", "uniforms"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(batch, name))
    assert sum(shard.masked_tokens for shard in shards) == batch.masked_tokens


def test_uniforms_are_uniform_and_differ_by_step_and_row(store, tokenizer, masker):
    batches = open_training(store, tokenizer, masker)
    uniforms = torch.stack([batches[step].uniforms for step in range(25)])
    assert uniforms.unique().numel() == uniforms.numel() == 25 * 24 * 64
    observed = torch.histc(uniforms, 20, 0, 1)
    assert ((observed - 1920) ** 2 / 1920).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64])
def test_evaluation_holds_every_line_once_with_its_own_masks(prepared, tokenizer, masker, batch_size):
    store = open_store(prepared / "valid.txt", tokenizer, max_tokens=62)
    plan = dataclasses.replace(PLAN, batch_size=batch_size)
    batches = list(EvaluationBatches(store, tokenizer, masker, plan))
    rows = torch.cat([restore_originals(batch) for batch in batches])
    assert len(rows) == len(store) == 40
    assert all(row[1:63].tolist() == store[i].tolist() for i, row in enumerate(rows))
    one = EvaluationBatches(store, tokenizer, masker, dataclasses.replace(PLAN, batch_size=40))[0]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), one.labels)
    assert torch.equal(torch.cat([batch.uniforms for batch in batches]), one.uniforms)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_masks_do_not_depend_on_padding(tmp_path, prepared, tokenizer, max_ngram):
    """Lines of all lengths have the same masks in batches, and on ranks, that are padded to other lengths."""
    pieces = (prepared / "train.txt").read_text(encoding="utf-8").split()
    lines = [" ".join(pieces[62 * i : 62 * i + 2 + 13 * i % 60]) for i in range(60)]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    store = open_store(tmp_path / "train.txt", tokenizer, max_tokens=62)
    masker = Masker(tokenizer, max_ngram, is_always_masked=False)

    def list_rows(batches) -> list[tuple]:
        """Return ids, labels and uniform values of the tokens of each line."""
        return [
            (ids[is_real].tolist(), labels[is_real].tolist(), uniforms[is_real].tolist())
            for batch in batches
            for ids, is_real, labels, uniforms in zip(
                batch.input_ids, batch.input_mask, batch.labels, batch.uniforms, strict=True
            )
        ]

    def list_evaluated(size: int) -> list[tuple]:
        return list_rows(
            EvaluationBatches(store, tokenizer, masker, dataclasses.replace(PLAN, batch_size=size))
        )

    together = list_evaluated(60)
    assert any(any(labels) for _, labels, _ in together)
    assert list_evaluated(1) == list_evaluated(7) == together
    one = list_rows([open_training(store, tokenizer, masker)[5]])
    for world_size in (2, 24):
        ranks = [
            open_training(store, tokenizer, masker, rank=r, world_size=world_size) for r in range(world_size)
        ]
        assert list_rows(rank[5] for rank in ranks) == one


def test_short_lines_are_padded_to_the_longest_of_the_batch(tmp_path, tokenizer, masker):
    (tmp_path / "train.txt").write_text("▁the ▁of\n▁the " + "s " * 19 + "\n", encoding="utf-8")
    store = open_store(tmp_path / "train.txt", tokenizer, max_tokens=62)
    batch = EvaluationBatches(store, tokenizer, masker, PLAN)[0]
    assert batch.input_mask.sum(1).tolist() == [4, 22]
    assert batch.input_ids.shape == (2, 24)  # 22, up to a multiple of 8
    assert (batch.input_ids[0, 4:] == tokenizer.pad_id).all()


def test_seeds_of_steps_differ():
    seeds = {
        derive_step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)
    }
    assert len(seeds) == 1000


@pytest.mark.parametrize("share", ["1/5", "1/3", "9/10", "1/100"])
def test_replay_mixes_exactly(store, tokenizer, masker, prepared, share):
    """Of any number of first rows, the share is replayed; each text is in its own order, epoch by epoch."""
    other = open_store(prepared / "valid.txt", tokenizer, max_tokens=62)
    share = Fraction(share)
    mixed = TrainingBatches(store, tokenizer, masker, PLAN, Replay(other, share))
    is_replayed = np.concatenate([mixed.is_replayed(step, np.arange(24)) for step in range(60)])
    assert all(is_replayed[:n].sum() == n * share // 1 for n in range(len(is_replayed) + 1))
    assert mixed.count_own_rows(60) == (~is_replayed).sum()
    lines = np.concatenate([mixed.select_lines(step) for step in range(60)])
    plain = np.concatenate([open_training(store, tokenizer, masker).select_lines(step) for step in range(60)])
    own, old = lines[~is_replayed], lines[is_replayed]
    assert np.array_equal(own, plain[: len(own)])
    for first in range(0, len(old) - 40, 40):
        assert sorted(old[first : first + 40]) == list(range(40))
    # What the batches hold, in any order of steps and sharded over ranks.
    for step in (7, 0):
        batch = mixed[step]
        rows = mixed.is_replayed(step, np.arange(24))
        for row, line, is_old in zip(restore_originals(batch), mixed.select_lines(step), rows, strict=True):
            assert row[1:63].tolist() == (other if is_old else store)[line].tolist()
        shards = [
            TrainingBatches(
                store, tokenizer, masker, dataclasses.replace(PLAN, rank=rank, world_size=3), mixed.replay
            )
            for rank in range(3)
        ]
        assert torch.equal(torch.cat([shard[step].input_ids for shard in shards]), batch.input_ids)
        own = sorted(mixed.select_lines(step)[~rows])
        assert [sorted(lines) for lines in mixed.select_global_lines(step)] == [
            own,
            sorted(mixed.select_lines(step)[rows]),
        ]


def test_replayed_lines_have_an_order_of_their_own(store, tokenizer, masker):
    """Of two texts of the same length, a batch does not pair the lines of the same numbers."""
    mixed = TrainingBatches(store, tokenizer, masker, PLAN, Replay(store, Fraction(1, 2)))
    own, old = (np.concatenate(part) for part in zip(*map(mixed.select_global_lines, range(50)), strict=True))
    assert sorted(own) == sorted(old) == list(range(600))
    assert (own == old).sum() < 10  # one is expected


def test_without_replay_nothing_is_replayed(store, tokenizer, masker):
    batches = open_training(store, tokenizer, masker)
    assert not batches.is_replayed(5, np.arange(24)).any()
    assert [len(lines) for lines in batches.select_global_lines(5)] == [24, 0]


@pytest.mark.parametrize("value", [-1, 0, 2008, 2**31 - 1])
def test_ids_that_change_during_a_run_end_it(prepared, tokenizer, masker, tmp_path, value):
    """They were verified when the store was opened; what cannot be an id in a line is found in its batch."""
    text = Path(shutil.copy(prepared / "train.txt", tmp_path / "train.txt"))
    store = open_store(text, tokenizer, max_tokens=62)
    batches = open_training(store, tokenizer, masker, batch_size=len(store))
    batches[0]
    with get_store_path(text).open("r+b") as file:  # in place, while it is mapped
        file.seek(4 * 100)
        file.write(value.to_bytes(4, "little", signed=True))
    with pytest.raises(DamagedStoreError, match=rf" {value}.* changed during the run; .*builds it again"):
        batches[0]
    with pytest.raises(DamagedStoreError):
        EvaluationBatches(store, tokenizer, masker, PLAN)[0]
