"""Probe what a model learned of English grammar.

The sentences are tagged ones of the Brown corpus.
tags    parts of speech, by ridge regression on the frozen states of one layer. With it (word_tag_accuracy)
        the most frequent tag of each word, and (random_tag_accuracy) random weights of the same model.
pairs   a verb against the same verb in the other number (is/are, was/were, has/have): the LM head compares
        both at the masked verb, a discriminator says which of the two looks replaced. Chance is 0.5.

The figures of a run are written to its probe.jsonl, too, and its report draws them: docs/evaluation.md.
"""

import argparse
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from lzma import decompress
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple, cast

import torch
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from DeBERTa.command import run_command
from DeBERTa.config import ModelConfig, find_experiments, read_json
from DeBERTa.data.tokenizer import WORD_MARK, Tokenizer
from DeBERTa.errors import DamagedCheckpointError, DataError, UsageError
from DeBERTa.export import find_step, find_vocabulary, load_checkpoint
from DeBERTa.files import append_line, raise_storage_errors
from DeBERTa.flags import FlagParser
from DeBERTa.hub.export import list_models
from DeBERTa.hub.inference import build_from_weights, check_same_vocabulary
from DeBERTa.hub.weights import StateDict, read_weights
from DeBERTa.model.pretraining import MaskedLanguageModel, ReplacedTokenDetectionModel
from DeBERTa.report.read import read_lines
from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify

CORPUS_SHA256 = "71c57fec81fc2bfbd204938948976cd37bec44d8b5d3566586208ac0378548c3"
FIT, CHOOSE, TEST = 0, 1, 2
PARTS = (FIT, FIT, FIT, CHOOSE, TEST)  # of the documents, in turn
PENALTIES = [10.0**power for power in range(-5, 2)]  # relative to the mean variance of the states
RANDOM_SEEDS = (1, 2, 3)
NUMBERS = (("bez", "ber"), ("bedz", "bed"), ("hvz", "hv"))  # tags of a verb in both numbers
OTHER_NUMBER = {"bez": "are", "ber": "is", "bedz": "were", "bed": "was", "hvz": "have", "hv": "has"}
INFINITIVE = {"md", "to", "do", "doz", "dod"}  # tags before a "have" that has no number
EPSILON = 1e-9  # for states that do not vary
MOST_PAIRS = 200  # of each verb
MOST_PIECES, BATCH = 128, 64

Model = MaskedLanguageModel | ReplacedTokenDetectionModel
Figures = dict[str, float]
logger = logging.getLogger("DeBERTa.probe")  # as a command, __name__ is "__main__"


class Corpus(NamedTuple):
    """Tagged words by their numbers, and the sentences as pieces.

    Attributes:
        words: (word, tag); the first is none, for [CLS] and [SEP].
        parts: FIT, CHOOSE or TEST by the numbers of the words that have pieces.
        ids: of each sentence, between [CLS] and [SEP].
        owners: of each sentence, per id the number of its word.
    """

    words: list[tuple[str, str]]
    parts: dict[int, int]
    ids: list[list[int]]
    owners: list[list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: probe(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags."""
    form = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(prog="python -m DeBERTa.probe", description=__doc__, formatter_class=form)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or the directory of a model")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    steps.add_argument("--all_steps", action="store_true", help="every checkpoint that was not probed yet")
    return parser.parse_args(argv)


def probe(arguments: argparse.Namespace) -> None:
    """Probe the model of a directory, or those of checkpoints, and log the figures."""
    run_dir: Path = arguments.run
    if (path := run_dir / "model.safetensors").is_file() and not (run_dir / "optimizer.pt").exists():
        if arguments.all_steps or arguments.step is not None:
            raise UsageError(f"{run_dir} is the directory of a model, without steps: give that of a run")
        config = ModelConfig.from_json(run_dir / "config.json")
        check_same_vocabulary(Tokenizer(run_dir / "spm.model"), run_dir / "tokenizer.json")
        measure(config, read_weights(path), path, run_dir / "spm.model")
        return
    if not arguments.all_steps:
        probe_step(run_dir, find_step(run_dir, arguments.step))
        return
    done = {line["step"] for line in read_lines(run_dir / "probe.jsonl")}
    for step in (step for step in list_steps(run_dir) or [find_step(run_dir, None)] if step not in done):
        try:
            verify(get_checkpoint_path(run_dir, step))
            probe_step(run_dir, step)
        except DamagedCheckpointError as error:  # noqa: PERF203 (a probe takes longer by far)
            logger.warning("%s; this checkpoint is skipped", error)  # or removed by the training command


def probe_step(run_dir: Path, step: int) -> None:
    """Probe the models of a checkpoint, and append the figures to `probe.jsonl`."""
    path, output = get_checkpoint_path(run_dir, step), run_dir / "probe.jsonl"
    figures: Figures = {"step": step}
    settings = read_json(path / "config.json")
    vocabulary = find_vocabulary(run_dir, settings).path
    for model in list_models(load_checkpoint(run_dir, step, settings)):
        measured = measure(model.config, model.weights, path / model.name, vocabulary)
        figures |= {f"{model.name}_{name}": value for name, value in measured.items()}
    with raise_storage_errors(output):
        append_line(output, json.dumps(figures))


def measure(config: ModelConfig, weights: StateDict, path: Path, vocabulary: Path) -> Figures:
    """Return the figures of both probes for the weights in `path`, and log them."""
    is_detector = "mask_predictions.classifier.bias" in weights
    kind = ReplacedTokenDetectionModel if is_detector else MaskedLanguageModel
    model = cast(Model, build_from_weights(kind, config, weights, path))
    corpus = read_corpus(vocabulary, config.max_position_embeddings)
    figures = probe_tags(model, corpus) | measure_random_weights(kind, config, vocabulary)
    figures |= probe_pairs(model, corpus, Tokenizer(vocabulary))
    logger.info("%s: %s", path, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


@lru_cache(maxsize=2)
def measure_random_weights(kind: type[Model], config: ModelConfig, vocabulary: Path) -> Figures:
    """Return mean and standard deviation of the tag probe with random weights."""
    corpus, accuracies = read_corpus(vocabulary, config.max_position_embeddings), []
    for seed in RANDOM_SEEDS:
        torch.manual_seed(seed)
        accuracies.append(probe_tags(kind(config).eval(), corpus)["tag_accuracy"])
    return {"random_tag_accuracy": mean(accuracies), "random_tag_deviation": stdev(accuracies)}


@lru_cache(maxsize=1)
def read_corpus(vocabulary: Path, max_length: int) -> Corpus:
    """Read the corpus, and encode its sentences in at most `max_length` ids.

    Raises `DataError` if the file is not that of this version.
    """
    path = find_experiments() / "probe" / "brown.txt.xz"
    packed = path.read_bytes() if path.is_file() else b""
    if sha256(packed).hexdigest() != CORPUS_SHA256:
        raise DataError(f"{path}: missing, or not the file of this version; restore it from the repository")
    tokenizer, corpus, documents = Tokenizer(vocabulary), Corpus([("", "")], {}, [], []), -1
    last = min(max_length, MOST_PIECES) - 1
    for line in decompress(packed).decode().splitlines():
        if line.startswith("# "):
            documents += 1
            continue
        chunks = [[token.rpartition("/")[::2] for token in chunk.split("|")] for chunk in line.split(" ")]
        ids, owners = [tokenizer.cls_id], [0]
        texts = ["".join(word for word, _ in chunk) for chunk in chunks]
        for chunk, pieces in zip(chunks, tokenizer.encode_lines(texts), strict=True):
            of_character = [number for number, (word, _) in enumerate(chunk, len(corpus.words)) for _ in word]
            lengths = [len(tokenizer.pieces[piece].lstrip(WORD_MARK)) for piece in pieces[:-1]]
            owners += [of_character[min(i, len(of_character) - 1)] for i in accumulate(lengths, initial=0)]
            ids += pieces
            corpus.words.extend(chunk)
        corpus.ids.append([*ids[:last], tokenizer.sep_id])
        corpus.owners.append([*owners[:last], 0])
        corpus.parts.update(dict.fromkeys(owners[1:last], PARTS[documents % len(PARTS)]))
    return corpus


def make_batches(sentences: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield numbers and padded ids of sentences of similar lengths."""
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        yield numbers, pad(sentences, numbers)


def pad(rows: list[list[int]], numbers: list[int]) -> torch.Tensor:
    """Return the rows of these numbers as one tensor, padded with 0."""
    return pad_sequence([torch.tensor(rows[number]) for number in numbers], batch_first=True)


def probe_tags(model: Model, corpus: Corpus) -> Figures:
    """Return the accuracy of a linear classifier of tags on the states of one layer.

    Weights come from the first part of the documents, layer and penalty from the second, the accuracy from
    the third.
    """
    words, parts = corpus.words, corpus.parts
    fit, choose, test = ([word for word in parts if parts[word] == part] for part in (FIT, CHOOSE, TEST))
    classes = {tag: number for number, tag in enumerate(sorted({tag for _, tag in words}))}
    labels = torch.tensor([classes[tag] for _, tag in words])
    targets = one_hot(labels[fit], len(classes)).double()
    best = (-1.0, 0.0, 0)
    for number, layer in enumerate(compute_word_states(model, corpus)):
        center, states = layer[fit].double().mean(0), layer[[*choose, *test]].float()
        centered = layer[fit].double() - center
        values, vectors = torch.linalg.eigh(centered.T @ centered)
        projected = vectors.T @ (centered.T @ (targets - targets.mean(0)))
        for penalty in PENALTIES:
            weights = vectors @ (projected / (values + penalty * values.mean() + EPSILON)[:, None])
            scores = states @ weights.float() + targets.mean(0) - center @ weights
            is_right = (scores.argmax(1) == labels[[*choose, *test]]).double()
            chosen, tested = (float(part.mean()) for part in is_right.split([len(choose), len(test)]))
            if chosen > best[0]:  # the first of equal ones: the test part decides nothing
                best = (chosen, tested, number)
    usual = {word: tag for (word, tag), _ in reversed(Counter(words[i] for i in fit).most_common())}
    baseline = mean(usual.get(word, "nn") == tag for word, tag in (words[i] for i in test))
    return {"tag_accuracy": best[1], "tag_layer": best[2], "tags": len(test), "word_tag_accuracy": baseline}


@torch.no_grad()
def compute_word_states(model: Model, corpus: Corpus) -> torch.Tensor:
    """Return the states of all words, float16 [layers, words, h].

    Those of words without pieces are 0. The first layer is the embeddings. A word's state is the mean of
    those of its pieces.
    """
    layers, width = model.config.num_hidden_layers + 1, model.config.hidden_size
    states = torch.zeros(layers, len(corpus.words), width, dtype=torch.float16)
    for batch, ids in make_batches(corpus.ids):
        owners = pad(corpus.owners, batch)
        output = model.deberta(ids, ids > 0)
        of_pieces = torch.stack([output.embeddings, *output.hidden_states])[:, owners > 0]
        numbers, index, counts = owners[owners > 0].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(layers, len(numbers), width).index_add_(1, index, of_pieces)
        states[:, numbers] = (sums / counts[:, None]).half()
    return states


@torch.no_grad()
def probe_pairs(model: Model, corpus: Corpus, tokenizer: Tokenizer) -> Figures:
    """Return how often the model prefers the verb of the corpus.

    The half width of the 95 % interval follows after ±. Without pairs there is no figure but their number.
    """
    pairs, correct = list_pairs(corpus, tokenizer), 0
    if not pairs:  # of a vocabulary without these verbs
        return {"pairs": 0}
    for batch, ids in make_batches([ids for ids, _, _ in pairs]):
        rows, (positions, wrong) = torch.arange(len(batch)), torch.tensor([pairs[i][1:] for i in batch]).T
        right, mask = ids[rows, positions], (ids > 0).long()
        labels, other = torch.zeros_like(ids), ids.clone()
        labels[rows, positions], other[rows, positions] = right, wrong
        if isinstance(model, MaskedLanguageModel):
            logits = model(ids.masked_fill(labels > 0, tokenizer.mask_id), mask, labels).logits
            margins = logits[rows, right] - logits[rows, wrong]
        else:
            of_wrong, of_right = (model.compute_logits(each, mask, None) for each in (other, ids))
            margins = (of_wrong - of_right)[rows, positions]
        correct += int((margins > 0).sum())
    share = correct / len(pairs)
    margin = 1.96 * (share * (1 - share) / len(pairs)) ** 0.5
    return {"pair_accuracy": share, "pair_margin": margin, "pairs": len(pairs)}


def list_pairs(corpus: Corpus, tokenizer: Tokenizer) -> list[tuple[list[int], int, int]]:
    """Return ids, position of the verb, and id of the verb in the other number.

    Of a singular and its plural there are as many: always preferring the same one gives 0.5.
    """
    found = defaultdict(list)
    for ids, owners in zip(corpus.ids, corpus.owners, strict=True):
        for position, owner in enumerate(owners):
            word, tag = corpus.words[owner]
            before = {tag for _, tag in corpus.words[max(owner - 3, 0) : owner]}
            if tag not in OTHER_NUMBER or (tag == "hv" and before & INFINITIVE):
                continue
            right, wrong = (tokenizer.piece_to_id.get(WORD_MARK + form) for form in (word, OTHER_NUMBER[tag]))
            if wrong and word.islower() and owners.count(owner) == 1 and ids[position] == right:
                found[tag].append((ids, position, wrong))
    chosen: list[tuple[list[int], int, int]] = []
    for tags in NUMBERS:
        count = min(MOST_PAIRS, *(len(found[tag]) for tag in tags))
        chosen += [found[tag][i * len(found[tag]) // count] for tag in tags for i in range(count)]
    return chosen


if __name__ == "__main__":
    sys.exit(main())
