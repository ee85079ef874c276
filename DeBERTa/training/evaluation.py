"""Evaluation on full splits: each line once, with the same masks every time."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.data.dataset import EvaluationBatches
from DeBERTa.data.loader import load_batches
from DeBERTa.log import log_regularly
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.pretraining import MaskedLanguageModel, ReplacedTokenOutput, RTDModel
from DeBERTa.training.distributed import all_reduce_sums, gather_vectors, get_rank, get_world_size
from DeBERTa.training.execution import autocast
from DeBERTa.training.metrics import Metrics, Sums, add, average_losses, warn_of_undefined
from DeBERTa.training.steps import make_scalar, sum_masked_lm

Outputs = Callable[[Batch], tuple[MaskedLoss, ReplacedTokenOutput | None]]
MAX_LOG_PERPLEXITY = 700.0  # exp of more is not finite


def compute_outputs(
    model: MaskedLanguageModel | RTDModel, batch: Batch
) -> tuple[MaskedLoss, ReplacedTokenOutput | None]:
    """Return losses and logits of a model that every rank holds in full."""
    if isinstance(model, MaskedLanguageModel):
        return model.compute_masked_loss(batch, sample=False), None
    generated, detected = model(batch, per_token=True)
    return generated.masked, detected


def evaluate_splits(
    model: nn.Module,
    outputs: Outputs,
    splits: dict[str, EvaluationBatches],
    config: TrainConfig,
    precision: str,
    device: torch.device,
) -> dict[str, Metrics]:
    """Return metrics by split, over all ranks.

    Masks and samples depend on `--seed` alone. Collective: every rank calls it.
    """
    rank, world_size = get_rank(), get_world_size()
    results = {}
    for split, batches in splits.items():
        # Every rank computes the same number of batches, because the outputs may be collective. Those past
        # the end repeat the last batch and are not counted.
        num_counted = len(range(rank, len(batches), world_size))
        num_rounds = math.ceil(len(batches) / world_size)
        indices = [min(rank + number * world_size, len(batches) - 1) for number in range(num_rounds)]
        loader = tqdm(
            load_batches(batches, indices, config.workers),
            desc="evaluating",
            total=num_rounds,
            leave=False,
            disable=None,
        )
        with log_regularly(partial("evaluating {}: {} batches".format, split, len(batches))):
            results[split] = evaluate(
                model, outputs, loader, precision, device, num_counted, batches.token_counts
            )
        warn_of_undefined(results[split], split)
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    outputs: Outputs,
    batches: Iterable[Batch],
    precision: str,
    device: torch.device,
    num_counted: int,
    token_counts: np.ndarray | None = None,
) -> Metrics:
    """Return metrics over the first `num_counted` batches of each rank.

    MLM: loss (nats per masked token), perplexity, accuracy. RTD: the same for the generator; for the
    discriminator loss (nats per token), accuracy, precision and recall of "replaced" at logit 0, and ROC
    AUC, on tokens sampled from the generator. None where nothing is counted. Restores the mode of `model`.

    token_counts: int64 [ids], how often each id occurs in the training text. With it, the ROC AUC that the
    rarity of a token alone gives is included.
    """
    sums: Sums = {}
    scores, replaced, ids = [np.zeros(0, np.float32)], [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    was_training = model.training
    model.eval()
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        with autocast(precision, device):
            masked, detected = outputs(batch)
        more = sum_masked_lm(masked, "generator_" if detected else "")
        if detected:
            more["discriminator_loss"] = detected.loss.sum()
            more["discriminator_targets"] = make_scalar(detected.labels.numel(), device)
        # A batch that is not counted adds zeros: the names must be the same on all ranks.
        add(sums, {name: value * (number < num_counted) for name, value in more.items()})
        if detected and number < num_counted:
            is_real = batch.input_mask > 0
            scores.append(detected.logits[is_real].float().cpu().numpy())
            replaced.append(detected.labels.bool().cpu().numpy())
            assert masked.samples is not None
            corrupted = batch.input_ids.masked_scatter(batch.labels > 0, masked.samples)
            ids.append(corrupted[is_real].cpu().numpy())
    model.train(was_training)

    metrics = average_losses(all_reduce_sums(sums))
    for name in ("loss", "generator_loss"):
        if name in metrics:
            loss = metrics[name]
            perplexity = None if loss is None else math.exp(min(loss, MAX_LOG_PERPLEXITY))
            metrics[name.replace("loss", "perplexity")] = perplexity
    if "discriminator_loss" in metrics:
        ours = (torch.from_numpy(np.concatenate(arrays)) for arrays in (scores, replaced, ids))
        all_scores, all_replaced, all_ids = (torch.cat(gather_vectors(each)).numpy() for each in ours)
        metrics |= compute_detection_metrics(all_scores, all_replaced)
        if token_counts is not None:
            metrics["discriminator_rarity_auc"] = compute_roc_auc(-token_counts[all_ids], all_replaced)
    return metrics


def compute_detection_metrics(scores: np.ndarray, replaced: np.ndarray) -> Metrics:
    """Return accuracy, precision and recall of "replaced" at score 0, and ROC AUC.

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
