"""Batches as a pure function of (seed, step, rank).

The same command always trains on the same data in the same order.
Shapes: B sequences of this rank, L length.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from DeBERTa.data.batch import Batch
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import TokenStore
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DamagedStoreError

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this length: faster matmuls
ORDER, MASKS, SAMPLES, REPLAY_ORDER = 0, 1, 2, 3  # independent streams of random numbers under one seed


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


class LineOrder:
    """The lines of a text in random order, epoch after epoch, without limit.

    An epoch is one pass over all lines.
    """

    def __init__(self, num_lines: int, seed: int, stream: int) -> None:
        self.num_lines, self._key = num_lines, [seed, stream]
        self._orders: dict[int, np.ndarray] = {}

    def _get_epoch_order(self, epoch: int) -> np.ndarray:
        """Return the order of all lines in an epoch, int32 [lines].

        The orders of the latest two epochs are cached.
        """
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, epoch, 0]))
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = generator.permutation(np.arange(self.num_lines, dtype=np.int32))
        return self._orders[epoch]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the lines at `positions` of the endless order, int64 of their shape."""
        epochs, offsets = np.divmod(positions, self.num_lines)
        lines = [self._get_epoch_order(int(e))[i] for e, i in zip(epochs, offsets, strict=True)]
        return np.array(lines, dtype=np.int64)


class Replay(NamedTuple):
    """A second text, of which training batches have a share.

    Of the first n rows of all batches, floor(n * share) are its lines, for every n.
    """

    store: TokenStore
    share: Fraction

    def count_rows(self, num_rows: np.ndarray) -> np.ndarray:
        """Return how many of the first `num_rows` rows are of this text, int64."""
        return num_rows * self.share.numerator // self.share.denominator


class TrainingBatches(Dataset[Batch]):
    """This rank's batch of every optimizer step, from step 0 without limit.

    A batch may hold the end of one epoch and the start of the next, so that no line is skipped or repeated.
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        masker: Masker,
        plan: BatchPlan,
        replay: Replay | None = None,
    ) -> None:
        self.store, self.tokenizer, self.masker, self.plan = store, tokenizer, masker, plan
        self.replay = replay or Replay(store, Fraction(0))
        self._order = LineOrder(len(store), plan.seed, ORDER)
        self._replay_order = LineOrder(len(self.replay.store), plan.seed, REPLAY_ORDER)

    def select_lines(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the lines of rows of the global batch of `step`, int64 [rows].

        By default the rows are those of this rank. Lines of the replayed text are indices of its own lines
        (`is_replayed`).
        """
        rows = self._get_rows() if rows is None else rows
        numbers = step * self.plan.batch_size + rows
        replayed_before, is_replayed = self.replay.count_rows(numbers), self.is_replayed(step, rows)
        lines = np.empty(len(rows), dtype=np.int64)
        lines[is_replayed] = self._replay_order[replayed_before[is_replayed]]
        lines[~is_replayed] = self._order[(numbers - replayed_before)[~is_replayed]]
        return lines

    def select_global_lines(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the own and the replayed lines of the global batch of `step`, int64."""
        rows = np.arange(self.plan.batch_size)
        lines, is_replayed = self.select_lines(step, rows), self.is_replayed(step, rows)
        return lines[~is_replayed], lines[is_replayed]

    def count_own_rows(self, num_steps: int) -> int:
        """Count the rows of the first `num_steps` global batches that are not replayed."""
        num_rows = num_steps * self.plan.batch_size
        return num_rows - int(self.replay.count_rows(np.array(num_rows)))

    def is_replayed(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Return which rows of the global batch of `step` are replayed, bool [rows]."""
        numbers = step * self.plan.batch_size + rows
        return self.replay.count_rows(numbers + 1) > self.replay.count_rows(numbers)

    def _get_rows(self) -> np.ndarray:
        """Return the rows of the global batch that belong to this rank, int64 [B]."""
        rank, world, size = self.plan.rank, self.plan.world_size, self.plan.batch_size
        return np.arange(size * rank // world, size * (rank + 1) // world)

    def __getitem__(self, step: int) -> Batch:
        """Return this rank's batch of a step."""
        rows = self._get_rows()
        sequences = [
            (self.replay.store if is_replayed else self.store)[line]
            for line, is_replayed in zip(self.select_lines(step), self.is_replayed(step, rows), strict=True)
        ]
        return make_batch(sequences, self.tokenizer, self.masker, self.plan, step, int(rows[0]))


@dataclass(eq=False)
class EvaluationBatches(Dataset[Batch]):
    """Batches of every line once, in file order.

    Masks and samples depend only on the seed and the line.

    Attributes:
        token_counts: int64 [ids], how often each id occurs in the training text, if that is known.
    """

    store: TokenStore
    tokenizer: Tokenizer
    masker: Masker
    plan: BatchPlan
    token_counts: np.ndarray | None = None

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
        sequences = [
            self.store[line] for line in range(first, min(first + self.plan.batch_size, len(self.store)))
        ]
        return make_batch(sequences, self.tokenizer, self.masker, self.plan, 0, first)


def derive_step_seed(seed: int, step: int, rank: int) -> int:
    """Return the dropout seed of a step, independent per rank, below 2^63."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def draw_uniforms(seed: int, stream: int, step: int, first_row: int, shape: tuple[int, int]) -> np.ndarray:
    """Return uniform values for rows of a global batch, float64 of `shape`.

    `shape` is [rows, draws]. The values are in [0, 1) and do not depend on how the batch is sharded. `draws`
    must be a multiple of 4, the block size of numpy's Philox.
    """
    bits = np.random.Philox(key=[seed, stream], counter=[first_row * shape[1] // 4, 0, step, 0])
    return np.random.Generator(bits).random(shape)


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
    Raises `DamagedStoreError` for ids that the vocabulary does not have, and for that of [PAD].
    """
    rows, max_seq_length = len(sequences), plan.max_seq_length
    longest = max(map(len, sequences)) + 2
    length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_seq_length)
    ids = np.full((rows, length), tokenizer.pad_id, dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=bool)
    ids[:, 0] = tokenizer.cls_id
    for row, sequence in enumerate(sequences):
        end = len(sequence) + 1
        ids[row, 1:end] = sequence
        ids[row, end] = tokenizer.sep_id
        mask[row, : end + 1] = True
    has_padding_inside = np.count_nonzero(ids) != np.count_nonzero(mask)  # the id of [PAD] is 0
    if has_padding_inside or ids.min() < 0 or ids.max() >= len(tokenizer):
        raise DamagedStoreError(
            f"token ids {ids.min()} to {ids.max()} are not all of {tokenizer.path}, or [PAD]: a file of ids "
            "was changed during the run; the same command builds it again"
        )
    draws = (rows, Masker.count_draws(max_seq_length))
    input_ids, labels = masker(ids, draw_uniforms(plan.seed, MASKS, step, first_row, draws))
    samples = draw_uniforms(plan.seed, SAMPLES, step, first_row, (rows, -(-max_seq_length // 4) * 4))
    arrays = (input_ids, mask, labels, np.ascontiguousarray(samples[:, :length]))
    return Batch.from_tensors(*map(torch.from_numpy, arrays))
