"""Statistics of the masks over more than 10,000 real lines."""

import time

import numpy as np
import pytest

from DeBERTa.data.masking import Masker
from DeBERTa.data.tokenizer import PUNCTUATION, SPECIAL, STARTS_WORD

LENGTH = 128  # [CLS], 126 tokens, [SEP]
REPEATS = 4


@pytest.fixture(scope="module")
def lines(tokenizer, sample_ids) -> np.ndarray:
    """Return 12,000 lines of the sample, int64 [12,000, LENGTH]; some end in padding."""
    rows = sample_ids[: len(sample_ids) // 126 * 126].reshape(-1, 126)
    lines = np.full((len(rows), LENGTH), tokenizer.pad_id, dtype=np.int64)
    lines[:, 0], lines[:, 1:-1], lines[:, -1] = tokenizer.cls_id, rows, tokenizer.sep_id
    lines = np.concatenate([lines] * REPEATS)[:12_000]
    lines[::50, 100:] = tokenizer.pad_id
    assert len(lines) == 12_000
    return lines


def mask(masker: Masker, lines: np.ndarray, seed: int = 0):
    return masker(lines, np.random.default_rng(seed).random((len(lines), masker.count_draws(LENGTH))))


def list_words(kinds: np.ndarray) -> list[list[int]]:
    """Return the positions of each word of a line, by a plain loop over the rule."""
    words: list[list[int]] = []
    joinable = False
    for position, kind in enumerate(kinds):
        if kind == SPECIAL:
            joinable = False
        elif joinable and kind not in (STARTS_WORD, PUNCTUATION):
            words[-1].append(position)
        else:
            words.append([position])
            joinable = kind != PUNCTUATION
    return words


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_share_and_special_tokens(tokenizer, lines, max_ngram):
    masked = mask(Masker(tokenizer, max_ngram, is_always_masked=False), lines).labels > 0
    real = tokenizer.piece_kinds[lines] != SPECIAL
    assert not (masked & ~real).any()
    assert abs(masked.sum() / real.sum() - 0.15) < 0.001


def test_unigrams_are_spread_evenly(tokenizer, lines):
    """At each position, within 4 standard errors of 15 % of the real tokens there."""
    masked = mask(Masker(tokenizer, 1, is_always_masked=True), lines).labels > 0
    real = tokenizer.piece_kinds[lines] != SPECIAL
    there = real.sum(0)[1:-1]
    share = masked.sum(0)[1:-1] / there
    assert there.min() > 1000
    assert (np.abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / there)).all()


def test_ngrams_are_spread_evenly_but_for_the_ends(tokenizer, lines):
    """Words are masked evenly, except the first and last two.

    A span of up to three words reaches those less often.
    """
    masked = mask(Masker(tokenizer, 3, is_always_masked=True), lines).labels > 0
    hits, totals, last = np.zeros(40), np.zeros(40), []
    for row, kinds in zip(masked, tokenizer.piece_kinds[lines], strict=True):
        words = list_words(kinds)[:40]
        last.append(row[list_words(kinds)[-1][0]])
        hits[: len(words)] += [row[word[0]] for word in words]
        totals[: len(words)] += 1
    share, error = hits / totals, np.sqrt(0.15 * 0.85 / totals)
    middle = share[2:]
    assert (np.abs(middle - np.average(middle, weights=totals[2:])) < 4.5 * error[2:]).all()
    assert 0.08 < share[0] < share[1] < 0.16
    assert abs(share[0] - 0.15 / (18 / 11) / 0.85) < 0.01  # only a span that begins there
    assert abs(np.mean(last) - share[0]) < 0.02  # only a span that ends there


def test_span_lengths_and_word_boundaries(tokenizer, lines):
    """Runs of masked words have lengths 1, 2, 3 in proportion 6:3:2.

    All tokens of a word are masked, or none.
    """
    masked = mask(Masker(tokenizer, 3, is_always_masked=True), lines).labels > 0
    counts = np.zeros(4, dtype=int)
    for row, kinds in zip(masked, tokenizer.piece_kinds[lines], strict=True):
        run = 0
        for word in list_words(kinds):
            hit = row[word]
            assert hit.all() or not hit.any()
            if hit[0]:
                run += 1
            elif run:
                counts[run] += 1
                run = 0
        if run:
            counts[run] += 1
    expected = counts.sum() * np.array([6, 3, 2]) / 11
    chi_square = ((counts[1:] - expected) ** 2 / expected).sum()
    assert counts.sum() > 60_000
    assert chi_square < 13.8, (
        f"{counts} against {expected}"
    )  # 0.1 % of true samples exceed this (2 degrees of freedom)


def test_punctuation_stands_alone(tokenizer):
    """In "Fell|ow|-|C|itizens|," the hyphen and the comma are words of their own."""
    line = ["▁great", "er", "-", "C", "itizens", ",", "▁", "able"]
    kinds = tokenizer.piece_kinds[[tokenizer.piece_to_id[piece] for piece in line]]
    assert list_words(kinds) == [[0, 1], [2], [3, 4], [5], [6, 7]]
    ids = np.array([[tokenizer.piece_to_id[piece] for piece in line * 15]] * 2000)
    masker = Masker(tokenizer, 3, is_always_masked=True)
    masked = masker(ids, np.random.default_rng(2).random((2000, masker.count_draws(120)))).labels > 0
    assert (masked[:, 3] == masked[:, 4]).all()
    assert (masked[:, 2] != masked[:, 3]).any()
    assert (masked[:, 2] != masked[:, 1]).any()


def test_input_ids_of_masked_tokens(tokenizer, lines):
    """MLM: 80 % [MASK], 10 % unchanged, 10 % random; RTD: [MASK]; others unchanged."""
    out = mask(Masker(tokenizer, 1, is_always_masked=False), lines)
    masked = out.labels > 0
    assert (out.input_ids[~masked] == lines[~masked]).all()
    assert (out.labels[masked] == lines[masked]).all()
    seen, original = out.input_ids[masked], lines[masked]
    count = len(seen)
    as_mask = seen == tokenizer.mask_id
    other = ~as_mask & (seen != original)
    for share, expected in ((as_mask.mean(), 0.8), (other.mean(), 0.1)):
        assert (
            abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 1e-4
        )  # a random token may hit
    assert not np.isin(seen[other], sorted(tokenizer.special_ids)).any()
    assert len(np.unique(seen[other])) > 0.99 * (len(tokenizer) - 5)

    rtd = mask(Masker(tokenizer, 1, is_always_masked=True), lines)
    assert (rtd.input_ids[rtd.labels > 0] == tokenizer.mask_id).all()


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_same_uniforms_same_masks_for_any_slice(tokenizer, lines, max_ngram):
    masker = Masker(tokenizer, max_ngram, is_always_masked=False)
    uniforms = np.random.default_rng(5).random((64, masker.count_draws(LENGTH)))
    batch, again = masker(lines[:64], uniforms), masker(lines[:64], uniforms)
    other = mask(masker, lines[:64], seed=6)
    slice_ = masker(lines[16:40], uniforms[16:40])
    for a, b, c, d in zip(batch, again, slice_, other, strict=True):
        assert (a == b).all()
        assert (a[16:40] == c).all()
        assert (a != d).any()


@pytest.mark.parametrize("words", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_short_lines(tokenizer, max_ngram, words):
    """Lines of a few words, or of special tokens only, are masked at 15 % on average."""
    line = [tokenizer.cls_id] + [tokenizer.piece_to_id["▁the"]] * words + [tokenizer.sep_id, tokenizer.pad_id]
    lines = np.array([line] * 20_000)
    masker = Masker(tokenizer, max_ngram, is_always_masked=True)
    draws = masker.count_draws(lines.shape[1])
    masked = masker(lines, np.random.default_rng(1).random((len(lines), draws))).labels > 0
    assert not masked[:, [0, -2, -1]].any()
    if words and (max_ngram == 1 or words > 2):
        error = np.sqrt(0.15 / masked.size * 3)
        assert abs(masked.sum() / (len(lines) * words) - 0.15) < 6 * error


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_masking_is_vectorized(tokenizer, sample_ids, max_ngram):
    """A batch of 256 x 512 takes 50 ms at most in the best of 15 runs."""
    ids = sample_ids[: 256 * 512].reshape(256, 512)
    masker = Masker(tokenizer, max_ngram, is_always_masked=False)
    uniforms = np.random.default_rng(0).random((256, masker.count_draws(512)))
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        masker(ids, uniforms)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
