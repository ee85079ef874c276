"""Masking: token ids in, corrupted ids and labels out, for a whole batch at once.

Shapes: B lines, L length, U words (maskable units) of the longest line, K spans of the fullest line.

A masked line is a pure function of its ids and its uniform numbers, of which every line takes the same count
(`count_draws`), so that any slice of a batch can be masked alone with the same result.
"""

from typing import NamedTuple

import numpy as np

from DeBERTa.data.tokenizer import CONTINUES_WORD, PUNCTUATION, SPECIAL, Tokenizer

MASKED = 0.15  # proportion of the real tokens (BERT, section 3.1)
AS_MASK, AS_ITSELF = 0.8, 0.1  # MLM: shown as [MASK], shown unchanged; the rest as a random token


class Masked(NamedTuple):
    """int64 [B, L] each: ids as the model sees them; the original id where masked, 0 elsewhere."""

    input_ids: np.ndarray
    labels: np.ndarray


class Masker:
    """Masks 15 % of the real tokens, every one equally likely; special tokens and padding never.

    `max_ngram` 1: single tokens, drawn without replacement. Above 1: spans of n whole words with p(n) proportional to
    1/n (DeBERTa, section 4.1.1), spread uniformly with at least one word between any two; only the first and last
    words of a line are hit less often, since a span reaches them from one side. `always_mask` shows every masked token
    as [MASK] (RTD) instead of 80 % [MASK], 10 % unchanged, 10 % a random token (MLM).
    """

    def __init__(self, tokenizer: Tokenizer, max_ngram: int, always_mask: bool) -> None:
        self.kinds = tokenizer.piece_kinds
        self.ordinary = np.flatnonzero(self.kinds != SPECIAL)
        self.mask_id = tokenizer.mask_id
        self.max_ngram = max_ngram
        self.always_mask = always_mask

    @staticmethod
    def count_draws(length: int) -> int:
        """Uniform numbers a line of `length` tokens takes; a multiple of 4, the block size of numpy's Philox."""
        return 4 * (length + 1)

    def __call__(self, ids: np.ndarray, uniforms: np.ndarray) -> Masked:
        """`ids` int [B, L], padded with [PAD]; `uniforms` float64 in [0, 1), [B, at least count_draws(L)]."""
        length = ids.shape[1]
        count, place, shown, other = np.split(uniforms[:, : 4 * (length + 1)], 4, axis=1)
        kinds = self.kinds[ids]
        if self.max_ngram == 1:
            masked = _sample_tokens(kinds != SPECIAL, count[:, 0], place[:, :length])
        else:
            masked = _sample_spans(kinds, self.max_ngram, count, place)
        labels = np.where(masked, ids, 0).astype(np.int64)
        return Masked(self._show(ids, masked, shown[:, :length], other[:, :length]), labels)

    def _show(self, ids: np.ndarray, masked: np.ndarray, shown: np.ndarray, other: np.ndarray) -> np.ndarray:
        """What the model sees at the masked positions."""
        if self.always_mask:
            return np.where(masked, self.mask_id, ids).astype(np.int64)
        random_ids = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        seen = np.where(shown < AS_MASK, self.mask_id, np.where(shown < AS_MASK + AS_ITSELF, ids, random_ids))
        return np.where(masked, seen, ids).astype(np.int64)


def _sample_tokens(real: np.ndarray, rounding: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [B, L]: in each line, the 15 % of its real tokens with the smallest keys.

    A fractional count is rounded up as often as its fraction says, so that the mean is exact for lines of any length.
    """
    counts = (real.sum(1) * MASKED + rounding).astype(np.int64)
    keys = np.where(real, keys, 2.0)
    smallest = np.sort(keys, axis=1)
    thresholds = np.take_along_axis(smallest, np.maximum(counts - 1, 0)[:, None], axis=1)
    return (keys <= thresholds) & (counts > 0)[:, None]


def _words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each token's word, int64 [B, L] (special tokens: that of a word before them), and words a line [B].

    A piece without the leading mark belongs to the word before it; punctuation and special tokens stand alone.
    """
    real = kinds != SPECIAL
    joins = np.zeros_like(real)
    previous = kinds[:, :-1]
    joins[:, 1:] = (kinds[:, 1:] == CONTINUES_WORD) & (previous != SPECIAL) & (previous != PUNCTUATION)
    index = np.cumsum(real & ~joins, axis=1) - 1
    return np.maximum(index, 0), index[:, -1] + 1


def _sample_spans(kinds: np.ndarray, max_ngram: int, draws: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [B, L]: tokens of spans that cover 15 % of each line's words on average.

    The number of spans is fixed first and their lengths drawn freely, so that lengths follow p(n) exactly. A span of n
    words and the free word behind it then count as one slot; a uniform choice of slots is a uniform choice among all
    arrangements in which no two spans touch.
    """
    word, words = _words(kinds)
    lengths = np.arange(1, max_ngram + 1)
    weights = (1 / lengths) / (1 / lengths).sum()
    spans = (words * MASKED / (weights @ lengths) + draws[:, 0]).astype(np.int64)
    most = int(spans.max(initial=0))
    if most == 0:
        return np.zeros(kinds.shape, dtype=bool)

    drawn = lengths[
        np.minimum(np.searchsorted(weights.cumsum(), draws[:, 1 : most + 1], side="right"), max_ngram - 1)
    ]
    span = np.where(np.arange(most) < spans[:, None], drawn, 0)
    # A line of fewer words than its span goes without it.
    fits = np.cumsum(span + (span > 0), axis=1) <= words[:, None] + 1
    span = np.where(fits, span, 0)
    spans = (span > 0).sum(1)

    slots = words + 1 - span.sum(1)
    width = int(slots.max())
    order = np.argsort(np.where(np.arange(width) < slots[:, None], keys[:, :width], 2.0), axis=1)[:, :most]
    order = np.sort(np.where(np.arange(order.shape[1]) < spans[:, None], order, width), axis=1)
    chosen = np.zeros_like(span)
    chosen[:, : order.shape[1]] = order

    rows, columns = np.nonzero(span)
    before = np.cumsum(span, axis=1) - span
    first = (chosen + before)[rows, columns]
    change = np.zeros((len(kinds), int(words.max()) + max_ngram + 1), dtype=np.int8)
    change[rows, first] = 1
    change[rows, first + span[rows, columns]] -= 1
    word_masked = np.cumsum(change, axis=1, dtype=np.int8) > 0
    return np.take_along_axis(word_masked, word, axis=1) & (kinds != SPECIAL)
