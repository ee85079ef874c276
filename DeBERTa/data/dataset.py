"""Batches as a pure function of (seed, step, rank): the same command always sees the same data in the same order.

Shapes: B sequences of this rank, L tokens of the longest of them, M masked tokens, P of them in the fullest sequence.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from DeBERTa.data.batch import Batch
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import TokenStore
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.processes import exit_with_parent

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this: matrix kernels like it
ORDER, MASKS, SAMPLES = 0, 1, 2  # independent streams of random numbers under one seed


@dataclass(frozen=True)
class BatchPlan:
    """Who reads what: `rank` of `world_size` takes its part of every global batch of `batch_size` sequences."""

    seed: int
    batch_size: int
    max_seq_length: int
    rank: int = 0
    world_size: int = 1


class TrainingBatches(Dataset):
    """Item `step` is this rank's batch of that optimiser step (from 0), for ever: epoch after epoch, reshuffled.

    An epoch is one pass over all lines in random order; a batch may hold the end of one epoch and the start of the
    next, so that no line is lost or repeated.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, masker: Masker, plan: BatchPlan) -> None:
        self.store, self.tokenizer, self.masker, self.plan = store, tokenizer, masker, plan
        self._orders: dict[int, np.ndarray] = {}

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The order of all lines in `epoch`; the last two epochs asked for are kept."""
        if epoch not in self._orders:
            generator = np.random.Generator(
                np.random.Philox(key=[self.plan.seed, ORDER], counter=[0, 0, epoch, 0])
            )
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = generator.permutation(np.arange(len(self.store), dtype=np.int32))
        return self._orders[epoch]

    def select_lines(self, step: int) -> np.ndarray:
        """Lines of this rank's part of the global batch of `step`, int64 [B]."""
        return self._lines(step, self._rows())

    def select_global_lines(self, step: int) -> np.ndarray:
        """Lines of the whole global batch, int64 [`batch_size`]."""
        return self._lines(step, np.arange(self.plan.batch_size))

    def _lines(self, step: int, rows: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(step * self.plan.batch_size + rows, len(self.store))
        return np.array([self._epoch_order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])

    def _rows(self) -> np.ndarray:
        """Rows of the global batch that belong to this rank."""
        rank, world = self.plan.rank, self.plan.world_size
        size = self.plan.batch_size
        return np.arange(size * rank // world, size * (rank + 1) // world)

    def __getitem__(self, step: int) -> Batch:
        sequences = [self.store[line] for line in self.select_lines(step)]
        return make_batch(sequences, self.tokenizer, self.masker, self.plan, step, int(self._rows()[0]))


class EvaluationBatches(Dataset):
    """Every line once, in file order, with masks and samples that depend on the seed and the line only."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, masker: Masker, plan: BatchPlan) -> None:
        self.store, self.tokenizer, self.masker, self.plan = store, tokenizer, masker, plan

    def __len__(self) -> int:
        return -(-len(self.store) // self.plan.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.plan.batch_size
        lines = range(first, min(first + self.plan.batch_size, len(self.store)))
        return make_batch(
            [self.store[line] for line in lines], self.tokenizer, self.masker, self.plan, 0, first
        )


def derive_step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's dropout: independent numbers for every (seed, step, rank), below 2^63."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def draw_uniforms(
    plan: BatchPlan, stream: int, draws: int, step: int, first_row: int, rows: int
) -> np.ndarray:
    """float64 [rows, draws] in [0, 1) for rows `first_row` onwards of a global batch: any cut gives the same numbers.

    `draws` must be a multiple of 4, the block size of numpy's Philox.
    """
    counter = [first_row * draws // 4, 0, step, 0]
    return np.random.Generator(np.random.Philox(key=[plan.seed, stream], counter=counter)).random(
        (rows, draws)
    )


def make_batch(
    sequences: list[np.ndarray],
    tokenizer: Tokenizer,
    masker: Masker,
    plan: BatchPlan,
    step: int,
    first_row: int,
) -> Batch:
    """[CLS] tokens [SEP] of each sequence (at most `max_seq_length - 2` ids), padded to the longest, masked.

    `first_row`: the first sequence's row in the global batch of `step`.
    """
    max_seq_length = plan.max_seq_length
    longest = max(len(sequence) for sequence in sequences) + 2
    length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_seq_length)
    ids = np.full((len(sequences), length), tokenizer.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    ids[:, 0] = tokenizer.cls_id
    for row, sequence in enumerate(sequences):
        end = len(sequence) + 1
        ids[row, 1:end] = sequence
        ids[row, end] = tokenizer.sep_id
        mask[row, : end + 1] = 1
    rows = len(sequences)
    masks = draw_uniforms(plan, MASKS, Masker.count_draws(max_seq_length), step, first_row, rows)
    samples = draw_uniforms(plan, SAMPLES, -(-max_seq_length // 4) * 4, step, first_row, rows)[:, :length]
    masked = masker(ids, masks)
    arrays = (masked.input_ids, mask, masked.labels, np.ascontiguousarray(samples))
    return Batch.from_tensors(*map(torch.from_numpy, arrays))


def load_batches(dataset: Dataset, indices: Sequence[int], workers: int) -> DataLoader:
    """Batches in order, prepared ahead by `workers` processes."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=serve_parent,
    )


def serve_parent(_worker: int) -> None:
    """In a process that prepares batches: end with the one that trains, and leave signals to it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent(signal.SIGKILL)
