"""Train BERT of transformers as the arm `mlm-absolute`.

It shows whether BERT learns as slowly.

    python experiments/ablations/bert.py output/ablations/mlm-absolute-...-seed1 --steps 800

It is `BertForMaskedLM`, of the same size and initialization, on the batches of the run, with its learning
rates, weight decay and clipping, in float32. Needs transformers. Prints the mean training loss over the
steps of each line of the run's metrics.jsonl, and that of the run.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from DeBERTa.command import run_command, write_output
from DeBERTa.config import ModelConfig, TrainConfig, read_json
from DeBERTa.data.dataset import BatchPlan, TrainingBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.flags import FlagParser
from DeBERTa.report.read import read_run
from DeBERTa.training.optimizer import build_optimizer, compute_lr_factor


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(compare)


def compare() -> None:
    """Train, and print both losses."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run of the arm mlm-absolute")
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="default: 800")
    flags = parser.parse_args()
    settings = read_json(flags.run / "config.json")
    config = TrainConfig.from_dict(settings["train"])
    model = build_bert(ModelConfig.from_dict(settings["model"]), config.seed)
    losses = train(model, config, flags.steps)
    rows = [row for row in read_run(flags.run).rows if row["kind"] == "train"]
    for before, row in pairwise([{"step": 0}, *rows]):
        steps = losses[before["step"] : row["step"]]
        if row["step"] <= flags.steps and row.get("loss") is not None:
            bert = sum(steps) / len(steps)
            write_output(f"to step {row['step']}: BertForMaskedLM {bert:.3f}, the run {row['loss']:.3f}\n")


def build_bert(config: ModelConfig, seed: int) -> nn.Module:
    """Return a new `BertForMaskedLM`.

    Raises `ConfigError` where transformers is missing, and for a model that is not a BERT.
    """
    if config.relative_attention or not config.position_biased_input or config.conv_kernel_size:
        raise ConfigError("the run is not of the arm mlm-absolute: its model is not a BERT; give such a run")
    try:
        from transformers import BertConfig, BertForMaskedLM  # optional
    except ImportError:
        raise ConfigError("the package transformers is missing: pip install transformers") from None
    torch.manual_seed(seed)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    others = ("max_position_embeddings", "initializer_range", "layer_norm_eps", "hidden_dropout_prob")
    same = {name: getattr(config, name) for name in (*sizes, *others, "attention_probs_dropout_prob")}
    return BertForMaskedLM(BertConfig(**same))


def train(model: nn.Module, config: TrainConfig, steps: int) -> list[float]:
    """Train on the batches of a run, and return the loss of every step."""
    tokenizer = Tokenizer(config.vocab_path)
    store = open_store(Path(config.data_dir) / "train.txt", tokenizer, config.max_seq_length - 2)
    plan = BatchPlan(config.seed, config.train_batch_size, config.max_seq_length)
    batches = TrainingBatches(store, tokenizer, Masker(tokenizer, config.max_ngram, False), plan)
    optimizer = build_optimizer([(model, config.learning_rate)], config)
    losses = []
    for step in range(1, steps + 1):
        batch = batches[step - 1]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * compute_lr_factor(step, config.num_training_steps, config)
        labels = batch.labels.long().masked_fill(batch.labels == 0, -100)  # those that it ignores
        loss = model(batch.input_ids.long(), attention_mask=batch.input_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(main())
