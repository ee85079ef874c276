"""Masking of a batch of token ids.

Shapes: B lines, L length.

A masked line is a pure function of its tokens and its uniform values, whatever the padding. Every line takes
the same number of them (`count_draws`), so that any slice of a batch can be masked separately with the same
result.
"""

from typing import NamedTuple

import numpy as np

from DeBERTa.data.tokenizer import CONTINUES_WORD, PUNCTUATION, SPECIAL, Tokenizer

MASKED_SHARE = 0.15  # of the ordinary tokens (BERT, section 3.1)
MASK_SHARE, SAME_SHARE = 0.8, 0.1  # MLM: replaced by [MASK], unchanged; the rest by a random token


class MaskedLines(NamedTuple):
    """Masked input ids and labels, integers [B, L].

    A label is the original id where masked, 0 elsewhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray


class Masker:
    """Masks 15 % of the ordinary tokens, or of the words.

    [CLS], [SEP], [UNK] and padding are never masked.

    With `max_ngram` 1, single tokens are drawn without replacement, all equally likely. Above 1, spans of n
    words are drawn with p(n) proportional to 1/n (ALBERT, section 4.1), spread uniformly with at least
    one word between any two. The first and last words of a line are masked less often than others, since a
    span reaches them from one side.

    `is_always_masked` replaces every masked token by [MASK] (RTD) instead of 80 % [MASK], 10 % unchanged,
    10 % a random token (MLM).
    """

    def __init__(self, tokenizer: Tokenizer, max_ngram: int, is_always_masked: bool) -> None:
        self.kinds = tokenizer.piece_kinds
        self.ordinary = np.flatnonzero(self.kinds != SPECIAL)
        self.mask_id = tokenizer.mask_id
        self.max_ngram = max_ngram
        self.is_always_masked = is_always_masked

    @staticmethod
    def count_draws(length: int) -> int:
        """Return how many uniform values a line of at most `length` tokens takes.

        The number is a multiple of 4, the block size of numpy's Philox.
        """
        return 4 * (length + 1)

    def __call__(self, ids: np.ndarray, uniforms: np.ndarray) -> MaskedLines:
        """Mask lines of token ids.

        `ids`: int [B, L], padded with [PAD]. `uniforms`: float64 [B, count_draws(N)] in [0, 1) for any N of
        at least L; the same N gives the same masks for every L.
        """
        length = ids.shape[1]
        # Column 0 of span_draws rounds the number of spans or tokens; the others draw span lengths.
        span_draws, keys, kind, other = np.split(uniforms, 4, axis=1)
        kinds = self.kinds[ids]
        if self.max_ngram == 1:
            is_masked = _sample_tokens(kinds != SPECIAL, span_draws[:, 0], keys[:, :length])
        else:
            is_masked = _sample_spans(kinds, self.max_ngram, span_draws, keys)
        replacements = self._draw_replacements(ids, kind[:, :length], other[:, :length])
        input_ids = np.where(is_masked, replacements, ids).astype(ids.dtype)
        return MaskedLines(input_ids, np.where(is_masked, ids, 0))

    def _draw_replacements(self, ids: np.ndarray, kind: np.ndarray, other: np.ndarray) -> np.ndarray | int:
        """Draw the input ids of masked tokens, for every position of `ids`.

        Returns int64 [B, L], or the id of [MASK] with `is_always_masked`.
        """
        if self.is_always_masked:
            return self.mask_id
        random_ids = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        same_or_random = np.where(kind < MASK_SHARE + SAME_SHARE, ids, random_ids)
        return np.where(kind < MASK_SHARE, self.mask_id, same_or_random)


def _sample_tokens(is_ordinary: np.ndarray, rounding: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Choose the 15 % of ordinary tokens with the smallest keys per line, bool [B, L].

    A count is rounded up with the probability of its fraction, so that the mean is exact for lines of any
    length.
    """
    counts = (is_ordinary.sum(1) * MASKED_SHARE + rounding).astype(np.int64)
    keys = np.where(is_ordinary, keys, 2.0)
    smallest = np.sort(keys, axis=1)
    thresholds = np.take_along_axis(smallest, np.maximum(counts - 1, 0)[:, None], axis=1)
    return (keys <= thresholds) & (counts > 0)[:, None]


def _index_words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the word index per token and the number of words per line.

    The shapes are int64 [B, L] and int64 [B]. A piece without the leading mark belongs to the word before it.
    Punctuation is a word by itself. Special tokens belong to no word, but have the index of the word before
    them.
    """
    is_ordinary = kinds != SPECIAL
    is_continuation = np.zeros_like(is_ordinary)
    previous = kinds[:, :-1]
    is_continuation[:, 1:] = (
        (kinds[:, 1:] == CONTINUES_WORD) & (previous != SPECIAL) & (previous != PUNCTUATION)
    )
    index = np.cumsum(is_ordinary & ~is_continuation, axis=1) - 1
    return np.maximum(index, 0), index[:, -1] + 1


def _sample_spans(kinds: np.ndarray, max_ngram: int, draws: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Choose spans that cover 15 % of each line's words on average, bool [B, L].

    The number of spans is fixed first and their lengths drawn independently, so that lengths follow p(n)
    exactly. A span of n words and the unmasked word after it then count as one place. A uniform choice of
    places is a uniform choice among all arrangements in which no two spans touch.
    """
    word, words = _index_words(kinds)
    lengths = np.arange(1, max_ngram + 1)
    weights = (1 / lengths) / (1 / lengths).sum()
    spans = (words * MASKED_SHARE / (weights @ lengths) + draws[:, 0]).astype(np.int64)
    most = int(spans.max(initial=0))
    if most == 0:
        return np.zeros(kinds.shape, dtype=bool)

    drawn = lengths[
        np.minimum(np.searchsorted(weights.cumsum(), draws[:, 1 : most + 1], side="right"), max_ngram - 1)
    ]
    span = np.where(np.arange(most) < spans[:, None], drawn, 0)
    # A span is dropped if the line has fewer words.
    has_room = np.cumsum(span + (span > 0), axis=1) <= words[:, None] + 1
    span = np.where(has_room, span, 0)
    spans = (span > 0).sum(1)

    places = words + 1 - span.sum(1)
    width = int(places.max())
    order = np.argsort(np.where(np.arange(width) < places[:, None], keys[:, :width], 2.0), axis=1)[:, :most]
    order = np.sort(np.where(np.arange(order.shape[1]) < spans[:, None], order, width), axis=1)
    chosen = np.zeros_like(span)
    chosen[:, : order.shape[1]] = order

    rows, columns = np.nonzero(span)
    before = np.cumsum(span, axis=1) - span
    first = (chosen + before)[rows, columns]
    change = np.zeros((len(kinds), int(words.max()) + max_ngram + 1), dtype=np.int8)
    change[rows, first] = 1
    change[rows, first + span[rows, columns]] -= 1
    is_masked = np.cumsum(change, axis=1, dtype=np.int8) > 0
    return np.take_along_axis(is_masked, word, axis=1) & (kinds != SPECIAL)
