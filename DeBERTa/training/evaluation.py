"""Evaluation of generator and discriminator on a whole split: every line once, the same masks every time."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from DeBERTa.config import TrainConfig
from DeBERTa.data.dataset import EvaluationBatches, load_batches
from DeBERTa.model.pretraining import RTDModel, corrupt
from DeBERTa.training.metrics import Sums, add, mean_losses
from DeBERTa.training.precision import autocast
from DeBERTa.training.steps import count, masked_lm_sums


def evaluate_splits(
    model: nn.Module, splits: dict[str, EvaluationBatches], config: TrainConfig, precision: str, device: torch.device
) -> dict[str, dict]:
    """Metrics by split, with masks and samples that depend on `--seed` only."""
    return {
        split: evaluate(
            model,
            load_batches(batches, range(len(batches)), config.workers),
            precision,
            device,
        )
        for split, batches in splits.items()
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader, precision: str, device: torch.device) -> dict:
    """Metrics of `model` (MLM or RTD) over `batches`, in evaluation mode (no dropout).

    MLM: loss (nats a masked token), perplexity, accuracy. RTD: the same for the generator; for the discriminator loss
    (nats a token), accuracy, precision and recall of "replaced" at logit 0, and ROC AUC, on tokens sampled from the
    generator. The model's mode is restored.
    """
    was_training = model.training
    model.eval()
    sums: Sums = {}
    scores, replaced = [], []
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=None):
        batch = batch.to(device)
        with autocast(precision, device):
            if not isinstance(model, RTDModel):
                out = model.masked_loss(batch, sample=False)
                add(sums, masked_lm_sums(out, ""))
                continue
            out = model.generator.masked_loss(batch, sample=True)
            add(sums, masked_lm_sums(out, "generator_"))
            corrupted_ids = corrupt(batch.input_ids, batch.labels, out.samples)
            found = model.discriminate(corrupted_ids, batch.input_mask, batch.labels)
        targets = count(found.labels.numel(), device)
        add(sums, {"discriminator_loss": found.loss.sum(), "discriminator_targets": targets})
        scores.append(found.logits[batch.input_mask > 0].float().cpu().numpy())
        replaced.append(found.labels.bool().cpu().numpy())
    model.train(was_training)

    metrics = mean_losses(sums)
    for name in ("loss", "generator_loss"):
        if name in metrics:
            metrics[name.replace("loss", "perplexity")] = float(np.exp(min(metrics[name], 700)))
    if scores:
        metrics |= detection_metrics(np.concatenate(scores), np.concatenate(replaced))
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
