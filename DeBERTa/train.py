"""Train or evaluate: `python -m DeBERTa.train --help`.

The module reads top to bottom: flags, data, model, run.
"""

import dataclasses
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

# Importing torch takes seconds, and there is no handler yet. Where the signal is blocked, it waits for one.
if (
    __name__ == "__main__" or Path(sys.argv[0]).name == "deberta-train"
) and signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

import numpy as np
import torch

from DeBERTa import command
from DeBERTa.config import FREE_PER_NODE, ModelConfig, RTDConfig, TrainConfig, read_json
from DeBERTa.data.dataset import BatchPlan, EvaluationBatches, Replay, TrainingBatches
from DeBERTa.data.loader import BYTES_PER_TOKEN, translate_worker_errors
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import TokenStore, open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.dry_run import DRY_RUN, describe_dry_run
from DeBERTa.errors import ConfigError, DataError, DebertaError, LaunchError
from DeBERTa.files import hash_file
from DeBERTa.flags import parse_flags
from DeBERTa.log import secure_console, set_up_logging
from DeBERTa.memory import MODEL, check_size, keep_freed_memory, translate_memory_errors
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel, build_model
from DeBERTa.processes import RunInterrupted
from DeBERTa.training import distributed
from DeBERTa.training.banner import collect_environment, describe_code, describe_run, format_rows
from DeBERTa.training.checkpoint import (
    find_newest_valid,
    get_checkpoint_path,
    list_steps,
    read_model,
    write_json,
)
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.execution import explain_precision, resolve_compile, resolve_precision, set_execution
from DeBERTa.training.initial_weights import check_silent_settings, find_vocabulary, load_initial_weights
from DeBERTa.training.interval import Interval
from DeBERTa.training.launch import find_job, launch
from DeBERTa.training.metrics import format_metrics, replace_non_finite
from DeBERTa.training.model_config import load_model_config
from DeBERTa.training.optimizer import count_warmup_steps
from DeBERTa.training.parallel import gather_to_rank_zero, load_full_weights
from DeBERTa.training.run_dir import check_disk_space, flatten, format_value, open_run_dir, save_models
from DeBERTa.training.signals import Signals
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from DeBERTa.training.summary import describe_end
from DeBERTa.training.trainer import Run, Trainer, resume
from DeBERTa.training.worker import (
    LAUNCH_ID,
    RESTART_COUNT,
    exit_process,
    get_local_rank,
    is_worker,
    log_rank,
)

Model = MaskedLanguageModel | RTDModel
logger = logging.getLogger("DeBERTa.train")  # as a command, __name__ is "__main__"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0 on success, 1 after an error, 2 for wrong flags, 128 plus its number after a signal.
    """
    return command.run_command(lambda: start(sys.argv[1:] if argv is None else argv))


def run_command() -> NoReturn:
    """Run the console command, and exit with its status."""
    secure_console()
    exit_process(main())


def start(argv: Sequence[str]) -> int:
    """Launch the workers of this node, or be one, and return the exit status."""
    config = parse_flags(argv)
    set_up_logging(config.log_level)
    config.validate()
    if config.dry_run:  # ranks have logs, which must not be in the run directory
        config = dataclasses.replace(config, output_dir=f"{config.run_dir}{DRY_RUN}")
    try:
        job = find_job(config)
        if job is not None:
            return launch(job, config, argv)
        if config.max_restarts and not is_worker():
            logger.warning(
                "--max_restarts is for several ranks: if this one is lost, the same command resumes"
            )
        with Signals() as signals, ExitStack() as stack:
            if is_worker():
                stack.enter_context(log_rank(config.run_dir))
                stack.enter_context(distributed.join_process_group(config.dist_timeout))
            with translate_worker_errors(), translate_memory_errors():
                run(config, signals)
    except RunInterrupted as stop:
        # Only rank 0's node has the checkpoints.
        is_unsaved = not is_worker() and not list_steps(config.run_dir)
        begins = "starts again: nothing was saved yet" if is_unsaved else "resumes from the last checkpoint"
        logger.info("stopped by %s; the same command %s", stop, begins)
        return stop.exit_status
    return 0


def run(config: TrainConfig, signals: Signals) -> None:
    """Train, evaluate, or both; write the final models and metrics."""
    device = torch.device("cuda", get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    precision = resolve_precision(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    check_directories(config)  # first: where a preset is not prepared, the vocabulary is missing, too
    tokenizer = Tokenizer(config.vocab_path)
    model_config, notes = load_model_config(config, tokenizer)
    notes += explain_precision(config, precision)
    for note in notes:
        logger.warning("%s", note)
    is_rtd = config.task_name == "RTD"
    masker = Masker(tokenizer, 1 if is_rtd else config.max_ngram, is_rtd)
    batches = open_training(config, tokenizer, masker) if config.do_train else None
    # Not the size of the vocabulary: a generator can sample a row past it.
    rows = model_config.models[0].vocab_size
    counts = count_tokens(batches.store, tokenizer, rows) if batches and is_rtd else None
    evaluation = open_evaluation(config, tokenizer, masker, counts)

    torch.manual_seed(config.seed)
    with translate_memory_errors(MODEL):
        check_model_size(model_config, config, device)
        model = build_model(model_config)
        loaded = load_initial_weights(config, model, tokenizer)
        model = model.to(device)
    execution = set_execution(model, config, device)
    texts = describe_evaluation(evaluation)
    settings: dict[str, dict] = {
        "train": config.to_dict(),
        "model": model_config.to_dict(),
        "data": {"vocabulary_sha256": tokenizer.fingerprint},
        "validation": {name: texts.get(name) for name in ("valid_sha256", "replay_valid_sha256")},
        "code": describe_code(),
    }
    steps = count_steps(config, batches) if batches else 0
    if batches:
        settings["train"] |= {"num_training_steps": steps, "precision": precision}
        settings["train"]["kernels"] = execution["kernels"]
        settings["train"]["compile"] = resolve_compile(config, device)
        if execution["kernels"] == "off":  # otherwise auto may mean another attention on another device
            settings["train"]["attention"] = "eager"
        settings["data"] |= describe_data(batches)
    weights = {}
    if distributed.is_distributed():  # reading large files again takes seconds
        weights = {f"init_{name}_sha256": hash_file(Path(found.path)) for name, found in loaded.items()}
        if config.resize_vocab:
            weights["resize_vocab_sha256"] = hash_file(find_vocabulary(config.resize_vocab))
    # Before DDP compares shapes in its own words.
    check_same_on_all_ranks(settings | {"evaluation": texts, "weights": weights})
    kind = ReplacedTokenStep if is_rtd else MaskedLMStep
    training = kind(model, config, precision, device, steps)
    if batches:
        interval, attention = Interval(device), execution["attention"]
        this_run = Run(
            config, model, training, batches, evaluation, settings, interval, attention, loaded, notes
        )
        if config.dry_run:
            logger.info(describe_dry_run(this_run))
            return
        train_and_save(this_run, signals, tokenizer.path)
    else:
        load_trained(config, model, tokenizer)
    if config.do_eval:
        write_evaluation(config, evaluate_splits(training, evaluation))


def train_and_save(this_run: Run, signals: Signals, vocabulary: Path) -> None:
    """Resume or start the run, train to its end, and write the final models."""
    first_step, steps = start_or_resume(this_run), this_run.training.total_steps
    if (warmup := count_warmup_steps(this_run.config.warmup, steps)) > steps:
        message = "the peak learning rate is not reached: the warm-up is %d steps, the run %d; lower --warmup"
        logger.warning(message, warmup, steps)
    logger.info(format_rows(describe_run(this_run, first_step)))
    Trainer(this_run, first_step, signals).train()
    full_model = get_full_model(this_run.config, this_run.model)
    if distributed.is_rank_zero():
        this_run.check_lock()
        directories = save_models(this_run.run_dir, full_model, vocabulary)
        logger.info(format_rows(describe_end(this_run.run_dir, directories)))


def write_evaluation(config: TrainConfig, results: dict[str, dict]) -> None:
    """Log the metrics of each split, and write them to `evaluation.json`."""
    for split, metrics in results.items():
        logger.info("%s  %s", split, format_metrics(metrics))
    if distributed.is_rank_zero():
        if not config.do_train:
            config.run_dir.mkdir(parents=True, exist_ok=True)
        finite = {split: replace_non_finite(metrics) for split, metrics in results.items()}
        write_json(config.run_dir / "evaluation.json", finite)


def check_same_on_all_ranks(settings: dict) -> None:
    """Raise `ConfigError` on every rank unless all ranks have the same settings.

    The message names the settings that differ. Flags that may differ per node are not compared: paths are
    compared by the content that is read from them.
    """
    own = {name: value for section in settings.values() for name, value in flatten(section).items()}
    first, *others = distributed.gather_values(own)
    for rank, values in enumerate(others, start=1):
        names = sorted((values.keys() | first.keys()) - FREE_PER_NODE)
        pairs = [(name, *(format_value(v.get(name)) for v in (first, values))) for name in names]
        if differing := [f"{name} ({ours} and {theirs})" for name, ours, theirs in pairs if ours != theirs]:
            raise ConfigError(
                f"ranks 0 and {rank} differ in {', '.join(differing)}: start the same command with the "
                "same package, model config, data and vocabulary on every node"
            )


def check_directories(config: TrainConfig) -> None:
    """Raise `DataError` if the directory of `--data_dir` or `--replay` is missing."""
    for flag, directory in (("--data_dir", config.data_dir), ("--replay", config.replay)):
        if directory and not Path(directory).is_dir():
            raise DataError(
                f"{flag} {directory}: no such directory; prepare_data.py makes one, "
                "with --preset NAME that of a preset"
            )


def open_split(config: TrainConfig, directory: str, split: str, tokenizer: Tokenizer) -> TokenStore:
    """Open the tokens of one split.

    Raises `DataError` when it is missing, empty, or has lines that are too long.
    """
    text = Path(directory) / f"{split}.txt"
    return open_store(text, tokenizer, config.max_seq_length - 2, has_progress=get_local_rank() == 0)


def open_training(config: TrainConfig, tokenizer: Tokenizer, masker: Masker) -> TrainingBatches:
    """Return this rank's batches of the training split.

    Raises `ConfigError` when a rank would have no sequence in some micro-batch.
    """
    batch, ranks, parts = config.train_batch_size, distributed.get_world_size(), config.accumulative_update
    if batch < ranks * parts:
        raise ConfigError(
            f"--train_batch_size {batch} is too small for {ranks} ranks with --accumulative_update {parts}: "
            f"give at least {ranks * parts}"
        )
    store = open_split(config, config.data_dir, "train", tokenizer)
    plan = BatchPlan(config.seed, batch, config.max_seq_length, distributed.get_rank(), ranks)
    check_size(plan.max_tokens * BYTES_PER_TOKEN, "a batch of one rank", "give a smaller --train_batch_size")
    replay = None
    if config.replay:
        share = Fraction(config.replay_share).limit_denominator(10_000)
        replay = Replay(open_split(config, config.replay, "train", tokenizer), share)
    return TrainingBatches(store, tokenizer, masker, plan, replay)


def open_evaluation(
    config: TrainConfig, tokenizer: Tokenizer, masker: Masker, counts: np.ndarray | None
) -> dict[str, EvaluationBatches]:
    """Open the validation split and, with `--do_eval`, the test split.

    "replay" is the validation split of `--replay`. `counts`: how often each id occurs in the training text.

    Splits that the data directory does not have are omitted. Raises `DataError` if `--do_eval` has no split.
    """
    plan = BatchPlan(config.seed, config.eval_batch_size, config.max_seq_length)
    wanted = ("valid", "test") if config.do_eval else ("valid",)
    there = [split for split in wanted if (Path(config.data_dir) / f"{split}.txt").exists()]
    if config.do_eval and not there:
        raise DataError(
            f"--do_eval: {config.data_dir} has neither valid.txt nor test.txt; omit --do_eval, or prepare a "
            f"held-out text: python prepare_data.py -i TEXT -o {Path(config.data_dir) / 'valid.txt'} "
            f"--vocab_path {config.vocab_path} --max_seq_length {config.max_seq_length}"
        )
    stores = {split: open_split(config, config.data_dir, split, tokenizer) for split in there}
    if config.replay:
        stores["replay"] = open_split(config, config.replay, "valid", tokenizer)
    return {
        split: EvaluationBatches(store, tokenizer, masker, plan, counts) for split, store in stores.items()
    }


def count_tokens(store: TokenStore, tokenizer: Tokenizer, num_ids: int) -> np.ndarray:
    """Count each id in the training text, int64 [num_ids].

    Every line has one [CLS] and one [SEP].
    """
    counts = store.count_ids(num_ids)
    counts[[tokenizer.cls_id, tokenizer.sep_id]] = counts.sum() * len(store) // store.meta.num_tokens
    return counts


def count_steps(config: TrainConfig, batches: TrainingBatches) -> int:
    """Return the number of optimizer steps of the run.

    It is `--num_training_steps`, or the steps of `--num_train_epochs` passes over the data.
    """
    if config.num_training_steps:
        return config.num_training_steps
    lines_per_step = config.train_batch_size * (1 - batches.replay.share)
    epochs = Fraction(str(config.num_train_epochs))  # exact: 1.1 epochs of 10 steps are 11 steps
    steps = math.ceil(epochs * len(batches.store) / lines_per_step)
    dataclasses.replace(config, num_training_steps=steps).validate("--num_train_epochs is too large: ")
    return steps


def check_model_size(
    model_config: ModelConfig | RTDConfig, config: TrainConfig, device: torch.device
) -> None:
    """Raise `MemoryLimitError` if the model cannot fit the memory."""
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in build_model(model_config).parameters())
    what = "the weights alone"
    if device.type == "cpu" and config.do_train and config.sharding == "none":
        what, size = "the weights with gradients and moments", 4 * size
    check_size(size, what, MODEL)


def check_trained(checkpoint: Path, config: ModelConfig | RTDConfig, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` if a checkpoint is of another vocabulary or config.

    Shapes of weights do not show all of that.
    """
    roles = ("model",) if isinstance(config, ModelConfig) else ("generator", "discriminator")
    for role, part in zip(roles, config.models, strict=True):
        check_silent_settings(checkpoint / "model.safetensors", role, part)
    data = read_json(checkpoint / "config.json").get("data") or {}
    if data.get("vocabulary_sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ConfigError(
            f"{checkpoint} was trained with another vocabulary than {tokenizer.path}; give its --vocab_path, "
            "and a --data_dir that was prepared with it"
        )


def load_trained(config: TrainConfig, model: Model, tokenizer: Tokenizer) -> None:
    """Load the weights of the run's newest valid checkpoint for evaluation.

    Weights named by `--init_*` are used instead. Raises `ConfigError` if there are neither.
    """
    if config.init_model or config.init_generator:
        return
    weights, problem = None, None
    if distributed.is_rank_zero():  # nodes may have disks of their own
        step, damages = find_newest_valid(config.run_dir)
        for damage in damages:
            logger.warning("damaged checkpoint: %s", damage)
        try:
            if step:
                check_trained(get_checkpoint_path(config.run_dir, step), model.config, tokenizer)
                weights = read_model(config.run_dir, step, model)
                logger.info("evaluating %s", get_checkpoint_path(config.run_dir, step))
        except DebertaError as error:
            problem = error
    is_found, message = distributed.broadcast_value((weights is not None, str(problem) if problem else ""))
    if message:
        raise problem or ConfigError(message)
    if not is_found:
        raise ConfigError(
            f"--do_eval: there is no checkpoint in {config.run_dir} and no --init_model (MLM) or "
            "--init_generator and --init_discriminator (RTD) to evaluate"
        )
    load_full_weights(model, weights)


def get_full_model(config: TrainConfig, model: Model) -> Model:
    """Return on rank 0 the trained model with full weights.

    All ranks must call it.
    """
    if config.sharding == "none" or not distributed.is_distributed():
        return model
    weights = gather_to_rank_zero(model.state_dict())
    if distributed.is_rank_zero():
        model = build_model(model.config)
        model.load_state_dict(weights, assign=True)
    return model


def describe_texts(stores: dict[str, TokenStore]) -> dict:
    """Return the SHA-256 of text and of token ids of each store, by name."""
    texts = {f"{name}_sha256": store.meta.text_sha256 for name, store in stores.items()}
    return texts | {f"{name}_ids_sha256": store.fingerprint for name, store in stores.items()}


def describe_data(batches: TrainingBatches) -> dict:
    """Return hash, lines and tokens of the training split, and `--replay`'s hash."""
    store, replay = batches.store, batches.replay
    texts = describe_texts({"train": store, "replay": replay.store})
    if not replay.share:
        texts |= {"replay_sha256": None, "replay_ids_sha256": None}
    return texts | {"train_lines": len(store), "train_tokens": store.meta.num_tokens}


def describe_evaluation(evaluation: dict[str, EvaluationBatches]) -> dict:
    """Return the hashes of the evaluated splits.

    That of `--replay` is "replay_valid": `describe_data` names its training split "replay".
    """
    names = {"replay": "replay_valid"}
    return describe_texts({names.get(split, split): batches.store for split, batches in evaluation.items()})


def start_or_resume(this_run: Run) -> int:
    """Open the run directory and load its newest valid checkpoint, if any.

    Returns the number of completed steps. Rank 0 searches for the checkpoint. An error on rank 0 is raised on
    every rank.
    """
    config, step, problem = this_run.config, 0, None
    if distributed.is_rank_zero():
        try:
            environment, launch = collect_environment(this_run), os.environ.get(LAUNCH_ID, "")
            # A restart by torchrun, which has no such variable, resumes from this run's checkpoints, too.
            is_restart = is_worker() and not launch and os.environ.get(RESTART_COUNT, "0") != "0"
            fresh = config.fresh and not is_restart
            step, this_run.lock = open_run_dir(config.run_dir, this_run.settings, environment, fresh, launch)
            coming = math.ceil((this_run.training.total_steps - step) / config.dump_interval)
            check_disk_space(config.run_dir, this_run.model, coming, config.keep_last)
        except DebertaError as error:
            problem = error
    step, message = distributed.broadcast_value((step, str(problem) if problem else ""))
    if message:
        raise problem or LaunchError(message)
    if step:
        resume(this_run, step)
    return step


if __name__ == "__main__":
    run_command()
