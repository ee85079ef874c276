"""Draws of the generator: recorded in one run, and given to another that differs from it by rounding.

A draw falls on another token where its uniform number lies between two sums of probabilities that differ in
their last bits. From then on the losses of two runs differ by far more than rounding, although nothing is
wrong. With the draws of the first run given to the second, everything else can be compared.
"""

import json
import os
from pathlib import Path

import torch

from DeBERTa.data.batch import Batch
from DeBERTa.model.pretraining import Generated, MaskedLanguageModel

KEY = 8  # uniform numbers, which no two rows of a run have in common

Draws = dict[str, list[int]]  # samples by row


def patch_generator(record: Path, given: Draws | None = None) -> None:
    """Append this process's own draws in training to files in `record`, and take the given ones instead."""
    generate = MaskedLanguageModel.generate
    record.mkdir(parents=True, exist_ok=True)
    file = (record / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def replay(model: MaskedLanguageModel, batch: Batch) -> Generated:
        generated = generate(model, batch)
        if not model.training or batch.input_ids.is_meta:  # or the order of gradients is looked up
            return generated
        keys = [row[:KEY].numpy().tobytes().hex() for row in batch.uniforms]
        counts = (batch.labels > 0).sum(1).tolist()
        own = [part.tolist() for part in generated.masked.samples.split(counts)]
        file.write(json.dumps(dict(zip(keys, own, strict=True))) + "\n")
        if given is None:
            return generated
        samples = torch.tensor([token for key in keys for token in given[key]])
        corrupted = batch.input_ids.masked_scatter(batch.labels > 0, samples)
        return Generated(generated.masked._replace(samples=samples), corrupted)

    MaskedLanguageModel.generate = replay


def read_draws(record: Path) -> Draws:
    """Return all recorded draws."""
    draws: Draws = {}
    for path in record.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            draws |= json.loads(line)
    return draws


def count_differences(one: Draws, other: Draws) -> tuple[int, int]:
    """Return how many draws differ, and how many there are. Both have the same rows."""
    assert one.keys() == other.keys()
    pairs = [pair for key in one for pair in zip(one[key], other[key], strict=True)]
    return sum(a != b for a, b in pairs), len(pairs)
