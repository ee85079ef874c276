"""What the models make of a few fixed validation sentences.

`samples.jsonl` has one line per evaluation:

step, residual_drift    norm of the discriminator's residual relative to the generator's table (GDES)
sentences               per sentence its tokens: {"token"}, and where they apply
    "guess"             the generator's token in place of a masked one, drawn from its distribution
    "probability"       the generator's probability of the original token
    "replaced"          the discriminator's probability that the token was replaced
"""

import json
import logging
from pathlib import Path

import torch
from torch import nn

from DeBERTa.data.batch import Batch
from DeBERTa.data.dataset import EvaluationBatches, make_batch
from DeBERTa.data.tokenizer import WORD_MARK
from DeBERTa.files import append_line
from DeBERTa.model.pretraining import RTDModel
from DeBERTa.training.distributed import is_rank_zero
from DeBERTa.training.parallel import all_gather_full
from DeBERTa.training.steps import Outputs, TrainingStep

SENTENCES, TOKENS = 3, 30  # the first tokens of as many lines, spread over the validation text

logger = logging.getLogger(__name__)


def write_samples(path: Path, step: int, training: TrainingStep, batches: EvaluationBatches) -> None:
    """Append a line to `samples.jsonl`, and log the sentences.

    Failing to write it is logged, and the run continues. Collective: every rank calls it.
    """
    batch = make_sample_batch(batches)
    outputs = training.evaluate(batch.to(training.device))
    drift = measure_residual_drift(training.model)
    if not is_rank_zero():
        return
    sentences = describe_sentences(batch, batches.tokenizer.pieces, outputs)
    for tokens in sentences:
        logger.info("step %d: %s", step, format_sentence(tokens))
    line = {"step": step, "residual_drift": drift, "sentences": sentences}
    try:
        append_line(path, json.dumps(line, ensure_ascii=False))
    except OSError as error:
        logger.warning("cannot write %s: %s; the run continues", path, error.strerror)


def make_sample_batch(batches: EvaluationBatches) -> Batch:
    """Return the masked sentences, the same at every evaluation and on all ranks."""
    lines = len(batches.store)
    chosen = [number * lines // SENTENCES for number in range(min(SENTENCES, lines))]
    sentences = [batches.store[line][:TOKENS] for line in chosen]
    return make_batch(sentences, batches.tokenizer, batches.masker, batches.plan, 0, 0)


def measure_residual_drift(model: nn.Module) -> float | None:
    """Return the norm of the GDES residual relative to the generator's word table.

    It is None without a residual. Collective: every rank calls it.
    """
    if not isinstance(model, RTDModel) or model.config.embedding_sharing != "gdes":
        return None
    models = (model.discriminator, model.generator)
    weights = [next(m.deberta.embeddings.word_embeddings.parameters()).detach() for m in models]
    residual, table = (float(all_gather_full(torch.linalg.vector_norm(weight))) for weight in weights)
    return residual / table


def describe_sentences(batch: Batch, pieces: list[str], outputs: Outputs) -> list[list[dict]]:
    """Return the tokens of each sentence as they stand in `samples.jsonl`.

    [CLS] and [SEP] are excluded.
    """
    (masked, corrupted_ids), detected = outputs
    originals = torch.where(batch.labels > 0, batch.labels, batch.input_ids)
    tokens: list[list[dict]] = [[{"token": pieces[i]} for i in row] for row in originals.tolist()]
    flat = [token for row in tokens for token in row]
    guesses, probabilities = corrupted_ids.flatten().tolist(), torch.exp(-masked.loss).tolist()
    for index, probability in zip(batch.masked.flat_index.tolist(), probabilities, strict=True):
        flat[index]["probability"] = round(probability, 4)
        # The table may have spare rows, which are no pieces.
        flat[index]["guess"] = pieces[guesses[index]] if guesses[index] < len(pieces) else "?"
    if detected:
        for token, score in zip(flat, torch.sigmoid(detected.logits.float()).flatten().tolist(), strict=True):
            token["replaced"] = round(score, 4)
    lengths = batch.input_mask.sum(1).tolist()
    return [row[1 : length - 1] for row, length in zip(tokens, lengths, strict=True)]


def format_sentence(tokens: list[dict]) -> str:
    """Return a sentence for the log, each masked token with the generator's guess.

    Percentages: the generator's probability of the original token, the discriminator's of "replaced".
    """
    text = ""
    for token in tokens:
        text += token["token"]
        if "probability" in token:
            text += f" [{token['guess'].lstrip(WORD_MARK)}, original {token['probability']:.0%}"
            text += f", replaced {token['replaced']:.0%}]" if "replaced" in token else "]"
    return text.replace(WORD_MARK, " ").strip()
