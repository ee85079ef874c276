"""The dropout mask's numpy reference: SplitMix64; tests/ops/cpu/test_dropout.py has its statistics."""

import numpy as np
import pytest
import torch

from DeBERTa.ops.dropout import BLOCK_WORDS, draw_keep_mask, draw_seed

# SplitMix64 from seed 1234567, as published with its source.
SEED = 1234567
WORDS = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-16])
def test_bits_are_those_of_the_published_generator(p):
    """Each word decides four elements, the lowest bits the first."""
    bits = np.array(WORDS, dtype="<u8").view("<u2").astype(int)
    expected = (bits >= round(p * 2**16)).tolist()
    assert draw_keep_mask((20,), SEED, p).tolist() == expected
    assert draw_keep_mask((9,), SEED, p, first=6).tolist() == expected[6:15]
    assert draw_keep_mask((2, 5, 2), SEED, p).flatten().tolist() == expected


def test_blocks_join():
    """Elements beyond one block of words are those that a later start draws."""
    first = 4 * BLOCK_WORDS
    mask = draw_keep_mask((first + 100,), SEED, 0.5)
    assert torch.equal(mask[first - 3 :], draw_keep_mask((103,), SEED, 0.5, first=first - 3))


def test_seeds_repeat_and_differ():
    torch.manual_seed(5)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(5)
    assert draw_seed() == first != second
    assert 0 <= min(first, second) <= max(first, second) < 2**62
