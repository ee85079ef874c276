"""Evaluation of generator and discriminator on a whole split: every line once, the same masks every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.data.dataset import EvaluationBatches, load_batches
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.pretraining import ReplacedTokenOutput, RTDModel
from DeBERTa.training.distributed import (
    all_reduce_sums,
    gather_objects,
    get_rank,
    get_world_size,
    is_rank_zero,
)
from DeBERTa.training.metrics import Sums, add, mean_losses
from DeBERTa.training.precision import autocast
from DeBERTa.training.steps import count, masked_lm_sums

Outputs = Callable[[Batch], tuple[MaskedLoss, ReplacedTokenOutput | None]]


def outputs_of(model: nn.Module) -> Outputs:
    """Losses and logits of a model that every process holds whole."""

    def outputs(batch: Batch) -> tuple[MaskedLoss, ReplacedTokenOutput | None]:
        if not isinstance(model, RTDModel):
            return model.masked_loss(batch, sample=False), None
        generated, found = model(batch, per_token=True)
        return generated.masked, found

    return outputs


def evaluate_splits(
    model: nn.Module,
    outputs: Outputs,
    splits: dict[str, EvaluationBatches],
    config: TrainConfig,
    precision: str,
    device: torch.device,
) -> dict[str, dict]:
    """Metrics by split, with masks and samples that depend on `--seed` only. Every process gets those of the whole."""
    results = {}
    for split, batches in splits.items():
        # All take as many batches, for outputs that need all processes; those past the end are not counted.
        mine = range(get_rank(), len(batches), get_world_size())
        rounds = -(-len(batches) // get_world_size())
        indices = [min(get_rank() + number * get_world_size(), len(batches) - 1) for number in range(rounds)]
        loader = load_batches(batches, indices, config.workers)
        results[split] = evaluate(model, outputs, loader, precision, device, len(mine))
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    outputs: Outputs,
    batches: DataLoader,
    precision: str,
    device: torch.device,
    counted: int,
) -> dict:
    """Metrics over the first `counted` of `batches` and those of the other processes, without dropout.

    MLM: loss (nats a masked token), perplexity, accuracy. RTD: the same for the generator; for the discriminator loss
    (nats a token), accuracy, precision and recall of "replaced" at logit 0, and ROC AUC, on tokens sampled from the
    generator. The mode of `model` is restored.
    """
    was_training = model.training
    model.eval()
    sums: Sums = {}
    scores, replaced = [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    for number, batch in enumerate(
        tqdm(batches, desc="evaluating", leave=False, disable=None if is_rank_zero() else True)
    ):
        batch = batch.to(device)
        with autocast(precision, device):
            out, found = outputs(batch)
        part = masked_lm_sums(out, "" if found is None else "generator_")
        if found is not None:
            part["discriminator_loss"] = found.loss.sum()
            part["discriminator_targets"] = count(found.labels.numel(), device)
        counts = number < counted
        add(sums, {name: value * counts for name, value in part.items()})
        if found is not None and counts:
            scores.append(found.logits[batch.input_mask > 0].float().cpu().numpy())
            replaced.append(found.labels.bool().cpu().numpy())
    model.train(was_training)

    metrics = mean_losses(all_reduce_sums(sums))
    for name in ("loss", "generator_loss"):
        if name in metrics:
            metrics[name.replace("loss", "perplexity")] = float(np.exp(min(metrics[name], 700)))
    if "discriminator_loss" in metrics:
        everywhere = gather_objects((np.concatenate(scores), np.concatenate(replaced)))
        metrics |= detection_metrics(*(np.concatenate(arrays) for arrays in zip(*everywhere, strict=True)))
    return metrics


def detection_metrics(scores: np.ndarray, replaced: np.ndarray) -> dict[str, float]:
    """Accuracy, precision and recall of "replaced" at score 0, and ROC AUC, from logits and bools [N]."""
    positive = scores > 0
    hits = int((positive & replaced).sum())
    return {
        "discriminator_accuracy": float((positive == replaced).mean()),
        "discriminator_precision": hits / max(int(positive.sum()), 1),
        "discriminator_recall": hits / max(int(replaced.sum()), 1),
        "discriminator_auc": roc_auc(scores, replaced),
        "discriminator_replaced": float(replaced.mean()),
    }


def roc_auc(scores: np.ndarray, replaced: np.ndarray) -> float:
    """Probability that a replaced token scores above an original one, ties counting half; 0.5 when one kind is absent.

    The Mann-Whitney statistic from average ranks; `scores` float [N], `replaced` bool [N].
    """
    positives = int(replaced.sum())
    negatives = len(replaced) - positives
    if not positives or not negatives:
        return 0.5
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(sizes)
    average_rank = last_rank - (sizes - 1) / 2
    rank_sum = float(average_rank[group[replaced]].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
