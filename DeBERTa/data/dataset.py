"""Batches as a pure function of (seed, step, rank).

The same command always trains on the same data in the same order.
Shapes: B sequences of this rank, L length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from DeBERTa.data.batch import Batch
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import TokenStore
from DeBERTa.data.tokenizer import Tokenizer

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this length: faster matmuls
ORDER, MASKS, SAMPLES = 0, 1, 2  # independent streams of random numbers under one seed


@dataclass(frozen=True)
class BatchPlan:
    """How global batches of `batch_size` sequences are sharded over ranks."""

    seed: int
    batch_size: int
    max_seq_length: int
    rank: int = 0
    world_size: int = 1

    @property
    def max_tokens(self) -> int:
        """Return the tokens of a rank's largest batch, padding included."""
        return -(-self.batch_size // self.world_size) * self.max_seq_length


class TrainingBatches(Dataset[Batch]):
    """This rank's batch of every optimizer step, from step 0 without limit.

    An epoch is one pass over all lines in random order. A batch may hold the end of one epoch and the start
    of the next, so that no line is skipped or repeated.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, masker: Masker, plan: BatchPlan) -> None:
        self.store, self.tokenizer, self.masker, self.plan = store, tokenizer, masker, plan
        self._orders: dict[int, np.ndarray] = {}

    def _get_epoch_order(self, epoch: int) -> np.ndarray:
        """Return the order of all lines in an epoch, int32 [lines].

        The orders of the latest two epochs are cached.
        """
        if epoch not in self._orders:
            generator = np.random.Generator(
                np.random.Philox(key=[self.plan.seed, ORDER], counter=[0, 0, epoch, 0])
            )
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = generator.permutation(np.arange(len(self.store), dtype=np.int32))
        return self._orders[epoch]

    def select_lines(self, step: int) -> np.ndarray:
        """Return the lines of this rank's batch of `step`, int64 [B]."""
        return self._select(step, self._get_rows())

    def select_global_lines(self, step: int) -> np.ndarray:
        """Return the lines of the global batch of `step`, int64 [batch_size]."""
        return self._select(step, np.arange(self.plan.batch_size))

    def _select(self, step: int, rows: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(step * self.plan.batch_size + rows, len(self.store))
        return np.array([self._get_epoch_order(int(e))[i] for e, i in zip(epochs, offsets, strict=True)])

    def _get_rows(self) -> np.ndarray:
        """Return the rows of the global batch that belong to this rank, int64 [B]."""
        rank, world = self.plan.rank, self.plan.world_size
        size = self.plan.batch_size
        return np.arange(size * rank // world, size * (rank + 1) // world)

    def __getitem__(self, step: int) -> Batch:
        """Return this rank's batch of a step."""
        sequences = [self.store[line] for line in self.select_lines(step)]
        return make_batch(sequences, self.tokenizer, self.masker, self.plan, step, int(self._get_rows()[0]))


class EvaluationBatches(Dataset[Batch]):
    """Batches of every line once, in file order.

    Masks and samples depend only on the seed and the line.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, masker: Masker, plan: BatchPlan) -> None:
        self.store, self.tokenizer, self.masker, self.plan = store, tokenizer, masker, plan

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.store) // self.plan.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Return a batch; the last one may be smaller.

        Raises `IndexError` for an index out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.plan.batch_size
        lines = range(first, min(first + self.plan.batch_size, len(self.store)))
        return make_batch(
            [self.store[line] for line in lines], self.tokenizer, self.masker, self.plan, 0, first
        )


def derive_step_seed(seed: int, step: int, rank: int) -> int:
    """Return the dropout seed of a step, independent per rank, below 2^63."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def draw_uniforms(
    plan: BatchPlan, stream: int, draws: int, step: int, first_row: int, rows: int
) -> np.ndarray:
    """Return uniform values for rows of a global batch, float64 [rows, draws].

    The values are in [0, 1) and do not depend on how the batch is sharded. `draws` must be a multiple of 4,
    the block size of numpy's Philox.
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
    """Add [CLS] and [SEP] to each sequence, pad to the longest, and mask.

    `sequences` have at most `max_seq_length - 2` ids; the first one is row `first_row` of the global batch.
    """
    max_seq_length = plan.max_seq_length
    longest = max(len(sequence) for sequence in sequences) + 2
    length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_seq_length)
    ids = np.full((len(sequences), length), tokenizer.pad_id, dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=bool)
    ids[:, 0] = tokenizer.cls_id
    for row, sequence in enumerate(sequences):
        end = len(sequence) + 1
        ids[row, 1:end] = sequence
        ids[row, end] = tokenizer.sep_id
        mask[row, : end + 1] = True
    rows = len(sequences)
    masks = draw_uniforms(plan, MASKS, Masker.count_draws(max_seq_length), step, first_row, rows)
    samples = draw_uniforms(plan, SAMPLES, -(-max_seq_length // 4) * 4, step, first_row, rows)[:, :length]
    masked = masker(ids, masks)
    input_ids, labels = masked.input_ids.astype(np.int32), masked.labels.astype(np.int32)
    arrays = (input_ids, mask, labels, np.ascontiguousarray(samples))
    return Batch.from_tensors(*map(torch.from_numpy, arrays))
