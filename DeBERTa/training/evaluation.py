"""Evaluation on full splits: each line once, with the same masks every time."""

import math
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from DeBERTa.data.batch import Batch
from DeBERTa.data.dataset import EvaluationBatches
from DeBERTa.data.loader import load_batches
from DeBERTa.log import log_regularly
from DeBERTa.training.distributed import all_reduce_sums, gather_vectors, get_rank, get_world_size
from DeBERTa.training.metrics import Metrics, Sums, add, average_losses, warn_of_undefined
from DeBERTa.training.steps import TrainingStep, make_scalar, sum_masked_lm

MAX_LOG_PERPLEXITY = 700.0  # exp of more is not finite


def evaluate_splits(training: TrainingStep, splits: dict[str, EvaluationBatches]) -> dict[str, Metrics]:
    """Return metrics by split, over all ranks.

    Masks and samples depend on `--seed` alone. Collective: every rank calls it.
    """
    rank, world_size = get_rank(), get_world_size()
    results = {}
    for split, batches in splits.items():
        # Every rank computes the same number of batches, because the outputs may be collective. Those past
        # the end repeat the last batch and are not counted.
        last = len(batches) - 1
        indices = [min(first + rank, last) for first in range(0, len(batches), world_size)]
        loader = load_batches(batches, indices, training.config.workers)
        shown = tqdm(loader, desc="evaluating", total=len(indices), leave=False, disable=None)
        with log_regularly(partial("evaluating {}: {} batches".format, split, len(batches))):
            num_counted = len(range(rank, len(batches), world_size))
            results[split] = evaluate(training, shown, num_counted, batches.token_counts)
        warn_of_undefined(results[split], split)
    return results


def evaluate(
    training: TrainingStep,
    batches: Iterable[Batch],
    num_counted: int,
    token_counts: np.ndarray | None = None,
) -> Metrics:
    """Return metrics over the first `num_counted` batches of each rank.

    MLM: loss (nats per masked token), perplexity, accuracy. RTD: the same for the generator; for the
    discriminator loss (nats per token), accuracy, precision and recall of "replaced" at logit 0, recall at
    precision 0.5, and ROC AUC, on tokens sampled from the generator. None where nothing is counted.

    token_counts: int64 [ids], how often each id occurs in the training text. With it, the ROC AUC that the
    rarity of a token alone gives is included.
    """
    sums: Sums = {}
    tokens = []  # by batch: logit, label and id of each real token
    for number, batch in enumerate(batches):
        batch, is_counted = batch.to(training.device), number < num_counted
        (masked, corrupted_ids), detected = training.evaluate(batch)
        more = sum_masked_lm(masked, "generator_" if detected else "")
        if detected:
            more["discriminator_loss"] = detected.loss.sum()
            more["discriminator_targets"] = make_scalar(detected.labels.numel(), training.device)
            is_real = (batch.input_mask > 0) & is_counted
            scores = detected.logits[is_real].float().cpu()
            tokens.append((scores, detected.labels.bool()[: len(scores)].cpu(), corrupted_ids[is_real].cpu()))
        # A batch that is not counted adds zeros: the names must be the same on all ranks.
        add(sums, {name: value * is_counted for name, value in more.items()})

    metrics = average_losses(all_reduce_sums(sums))
    prefix = "generator_" if tokens else ""
    loss = metrics[f"{prefix}loss"]
    metrics[f"{prefix}perplexity"] = None if loss is None else math.exp(min(loss, MAX_LOG_PERPLEXITY))
    if tokens:
        ours = (torch.cat(column) for column in zip(*tokens, strict=True))
        all_scores, all_replaced, all_ids = (torch.cat(gather_vectors(each)).numpy() for each in ours)
        metrics |= compute_detection_metrics(all_scores, all_replaced)
        if token_counts is not None:
            metrics["discriminator_rarity_auc"] = compute_roc_auc(-token_counts[all_ids], all_replaced)
    return metrics


def compute_detection_metrics(scores: np.ndarray, replaced: np.ndarray) -> Metrics:
    """Return the metrics of a detector of replaced tokens.

    They are accuracy, precision and recall of "replaced" at score 0, and of all thresholds ROC AUC and the
    recall at a precision of at least 0.5.

    Precision is undefined (None) where no token is classified as replaced, recall where none is. Loss and
    accuracy of the best constant answer are included: the entropy of the share of replaced tokens (nats), and
    the share of the larger class.

    `scores` float [N], `replaced` bool [N].
    """
    positive = scores > 0
    hits, share = int((positive & replaced).sum()), float(replaced.mean())
    return {
        "discriminator_accuracy": float((positive == replaced).mean()),
        "discriminator_precision": hits / int(positive.sum()) if positive.any() else None,
        "discriminator_recall": hits / int(replaced.sum()) if replaced.any() else None,
        "discriminator_recall_at_precision_50": compute_recall_at_precision(scores, replaced, 0.5),
        "discriminator_auc": compute_roc_auc(scores, replaced),
        "discriminator_replaced": share,
        "discriminator_replaced_entropy": sum(-p * math.log(p) for p in (share, 1 - share) if p),
        "discriminator_majority_accuracy": max(share, 1 - share),
    }


def compute_roc_auc(scores: np.ndarray, replaced: np.ndarray) -> float | None:
    """Return the probability that a replaced token scores above an original one.

    Ties count half. None when all tokens are of one kind. It is computed as the Mann-Whitney statistic from
    average ranks.

    `scores` float [N], `replaced` bool [N].
    """
    positives = int(replaced.sum())
    negatives = len(replaced) - positives
    if not positives or not negatives:
        return None
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(sizes)
    average_rank = last_rank - (sizes - 1) / 2
    rank_sum = float(average_rank[group[replaced]].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def compute_recall_at_precision(scores: np.ndarray, replaced: np.ndarray, precision: float) -> float | None:
    """Return the largest recall of "replaced" with at least `precision`.

    It is 0 when no threshold reaches that precision, and None when no token is replaced.

    `scores` float [N], `replaced` bool [N].
    """
    if not replaced.any():
        return None
    order = np.argsort(-scores)
    hits = np.cumsum(replaced[order])
    is_threshold = np.append(np.diff(scores[order]) != 0, True)  # equal scores are not separated
    is_reached = hits >= precision * np.arange(1, len(hits) + 1)
    return int(hits[is_threshold & is_reached].max(initial=0)) / int(hits[-1])
