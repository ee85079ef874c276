"""Batches and configs for tests of the training step."""

import torch

from DeBERTa import TrainConfig
from DeBERTa.data.batch import Batch


def random_batch(rows: int = 4, length: int = 32, vocabulary: int = 2000, seed: int = 3) -> Batch:
    """Return random tokens, some sequences padded, about 15 % masked as [MASK]: the last id."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (rows, length), generator=generator)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row :] = 0
    ids *= mask
    masked = (torch.rand(rows, length, generator=generator) < 0.15) & (mask > 0)
    masked[:, 0] = False
    masked[:, 1] = True
    labels = torch.where(masked, ids, 0)
    uniforms = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return Batch.from_tensors(torch.where(masked, vocabulary, ids), mask, labels, uniforms)


def train_config(**values) -> TrainConfig:
    """Return defaults for tests, with a short schedule and one step of warm-up."""
    return TrainConfig(
        **{"num_training_steps": 10, "warmup": 1.0, "train_batch_size": 4, "do_train": True} | values
    )
