"""Train or evaluate: `python -m DeBERTa.train --help`. Reads top to bottom: flags, data, model, run."""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from DeBERTa.config import ConfigError, ModelConfig, RTDConfig, TrainConfig, read_json
from DeBERTa.data.corpus import DataError
from DeBERTa.data.dataset import BatchPlan, EvaluationBatches, TrainingBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import TokenStore, open_store
from DeBERTa.data.tokenizer import Tokenizer, VocabularyError
from DeBERTa.hub.published import load_masked_lm, load_rtd
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.training.banner import banner, environment
from DeBERTa.training.checkpoint import (
    check_same_run,
    checkpoint_path,
    load_model,
    save_models,
    saved_steps,
    write_json,
)
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.loop import NotFiniteError, Run, resume, train
from DeBERTa.training.memory import keep_freed_memory
from DeBERTa.training.metrics import describe
from DeBERTa.training.optimizer import warmup_steps
from DeBERTa.training.precision import resolve_precision
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep

CONFIG_DIR = Path(__file__).resolve().parent.parent / "experiments" / "language_model"
SPARE_ROWS = 127  # a word table may have that many rows more than the vocabulary has pieces (128100 for 128001)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 after an error told in one sentence, 2 for wrong usage."""
    config = parse_flags(argv)
    try:
        run(config)
    except (ConfigError, DataError, VocabularyError, NotFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse_flags(argv: Sequence[str] | None) -> TrainConfig:
    """Flags to a `TrainConfig`: one flag a field. Unambiguous beginnings of a flag work too, as they always did."""
    parser = argparse.ArgumentParser(prog="python -m DeBERTa.train", description="Pre-train a DeBERTa encoder.")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"].replace("%", "%%")
        shown = f"{text} (default: {'none' if field.default in ('', None) else field.default})"
        kind = hints[field.name]
        if kind is bool or isinstance(kind, types.UnionType):
            form = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
        else:
            form = {"type": kind, "choices": field.metadata["choices"] or None}
        parser.add_argument(f"--{field.name}", default=field.default, help=shown, **form)
    return TrainConfig(**vars(parser.parse_args(argv)))


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def run(config: TrainConfig) -> None:
    """One run, from flags to final models or figures."""
    config.validate()
    refuse_many_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = Tokenizer(config.vocab_path)
    model_config = load_model_config(config, tokenizer)
    masker = Masker(tokenizer, 1 if config.task_name == "RTD" else config.max_ngram, config.task_name == "RTD")
    train_store = open_split(config, "train", tokenizer) if config.do_train else None
    evaluation = open_evaluation(config, tokenizer, masker)

    torch.manual_seed(config.seed)
    model = build_model(config, model_config).to(device)
    if train_store is not None:
        plan = BatchPlan(config.seed, config.train_batch_size, config.max_seq_length)
        batches = TrainingBatches(train_store, tokenizer, masker, plan)
        total_steps = number_of_steps(config, batches)
        step_class = MaskedLMStep if config.task_name == "MLM" else ReplacedTokenStep
        this_run = Run(config, model, step_class(model, config, precision, device, total_steps), batches, evaluation)
        data = {**describe_data(batches), "vocabulary_sha256": tokenizer.fingerprint}
        resolved = {
            "num_training_steps": total_steps,
            "warmup": warmup_steps(config, total_steps),
            "precision": precision,
        }
        first_step = open_run_folder(
            this_run, {"train": config.to_dict() | resolved, "model": model_config.to_dict(), "data": data}
        )
        print(banner(this_run, first_step), file=sys.stderr)
        train(this_run, first_step)
        folders = save_models(config.run_dir, model, tokenizer.path)
        print(f"final models: {', '.join(map(str, folders))}", file=sys.stderr)
    else:
        load_trained(config, model)
    if config.do_eval:
        results = evaluate_splits(model, evaluation, config, precision, device)
        for split, metrics in results.items():
            print(f"{split}  {describe(metrics)}", file=sys.stderr)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.run_dir / "evaluation.json", results)


def refuse_many_processes() -> None:
    """One process trains alone; several set-ups of one job must not train several models in silence."""
    if os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
        raise ConfigError("WORLD_SIZE is not 1, but this version trains in one process: unset WORLD_SIZE and RANK")


def load_model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig | RTDConfig:
    """The config file, with `--vocab_size` applied, checked against vocabulary and sequence length."""
    path = Path(config.model_config)
    if not path.exists() and (CONFIG_DIR / path).exists():
        path = CONFIG_DIR / path
    values = read_json(path)
    if config.task_name == "RTD":
        parts = [values[name] for name in ("generator", "discriminator") if isinstance(values.get(name), dict)]
    else:
        parts = [values]
    if config.vocab_size:
        for part in parts:
            part["vocab_size"] = config.vocab_size
    model_config = (RTDConfig if config.task_name == "RTD" else ModelConfig).from_dict(values, str(path))

    models = [model_config]
    if isinstance(model_config, RTDConfig):
        models = [model_config.generator, model_config.discriminator]
    rows = models[0].vocab_size
    if not len(tokenizer) <= rows <= len(tokenizer) + SPARE_ROWS:
        fitting = -(-len(tokenizer) // 8) * 8
        raise ConfigError(
            f"the vocabulary {tokenizer.path} has {len(tokenizer)} tokens, but the model config {path} has "
            f"vocab_size {rows}; give the right --vocab_path, or --vocab_size {fitting} for a new model"
        )
    positions = min(model.max_position_embeddings for model in models)
    if config.max_seq_length > positions:
        raise ConfigError(
            f"--max_seq_length {config.max_seq_length} exceeds max_position_embeddings {positions} of {path}"
        )
    return model_config


def open_split(config: TrainConfig, split: str, tokenizer: Tokenizer) -> TokenStore:
    """The tokens of one split. Raises when it is missing, empty, or has lines longer than `--max_seq_length` allows."""
    if not Path(config.data_dir).is_dir():
        raise DataError(f"--data_dir {config.data_dir}: no such folder; prepare_data.py makes one")
    return open_store(Path(config.data_dir) / f"{split}.txt", tokenizer, config.max_seq_length - 2)


def open_evaluation(config: TrainConfig, tokenizer: Tokenizer, masker: Masker) -> dict[str, EvaluationBatches]:
    """Batches of the validation split, and with `--do_eval` of the test split, where the data folder has them."""
    plan = BatchPlan(config.seed, config.eval_batch_size, config.max_seq_length)
    wanted = ("valid", "test") if config.do_eval else ("valid",)
    there = [split for split in wanted if (Path(config.data_dir) / f"{split}.txt").exists()]
    if config.do_eval and not there:
        raise DataError(f"--do_eval: {config.data_dir} has neither valid.txt nor test.txt; prepare_data.py makes them")
    return {split: EvaluationBatches(open_split(config, split, tokenizer), tokenizer, masker, plan) for split in there}


def number_of_steps(config: TrainConfig, batches: TrainingBatches) -> int:
    """`--num_training_steps`, or as many as `--num_train_epochs` passes over the data need."""
    if config.num_training_steps:
        return config.num_training_steps
    return math.ceil(config.num_train_epochs * len(batches.store) / config.train_batch_size)


def build_model(config: TrainConfig, model_config: ModelConfig | RTDConfig) -> nn.Module:
    """The model with fresh weights, or those of the `--init_*` files."""
    if isinstance(model_config, ModelConfig):
        model = MaskedLanguageModel(model_config)
        if config.init_model:
            load_masked_lm(model, config.init_model)
        return model
    model = RTDModel(model_config)
    if bool(config.init_generator) != bool(config.init_discriminator):
        raise ConfigError("--init_generator and --init_discriminator belong together: give both or neither")
    if config.init_generator:
        load_rtd(model, config.init_generator, config.init_discriminator)
    return model


def load_trained(config: TrainConfig, model: nn.Module) -> None:
    """For evaluation alone: the weights of the run's newest checkpoint, unless `--init_*` named others."""
    steps = saved_steps(config.run_dir)
    if steps and not (config.init_model or config.init_generator):
        load_model(config.run_dir, steps[-1], model)
        print(f"evaluating {checkpoint_path(config.run_dir, steps[-1])}", file=sys.stderr)
    elif not (config.init_model or config.init_generator):
        raise ConfigError(
            f"--do_eval: there is no checkpoint in {config.run_dir} and no --init_model (MLM) or "
            "--init_generator and --init_discriminator (RTD) to evaluate"
        )


def describe_data(batches: TrainingBatches) -> dict:
    """What the run learns from, by content."""
    store = batches.store
    return {"train_sha256": store.text_sha256, "train_lines": len(store), "train_tokens": store.num_tokens}


def open_run_folder(this_run: Run, settings: dict) -> int:
    """Make the run's folder, or go on with the run in it: returns the updates done. Keeps settings and environment."""
    run_dir = this_run.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if saved_steps(run_dir):
            check_same_run(read_json(run_dir / "config.json"), settings, run_dir)
        write_json(run_dir / "config.json", settings)
        write_json(run_dir / "environment.json", environment(this_run.training.device))
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"cannot write the run's folder {run_dir}: {reason}; give another --output_dir") from None
    return resume(this_run)


if __name__ == "__main__":
    sys.exit(main())
