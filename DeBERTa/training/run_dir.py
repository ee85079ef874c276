"""The run directory: opening it, resuming or starting over, and the final models.

Final models are model/ (MLM), or generator/ and discriminator/ (RTD), as hub/export.py writes them.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from torch import nn

from DeBERTa.config import FREE_TO_CHANGE, read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import (
    ConfigError,
    DamagedCheckpointError,
    StorageError,
    VocabularyError,
    describe_os_error,
)
from DeBERTa.files import find_unused_path, open_atomic, raise_storage_errors, read_file, remove
from DeBERTa.hub.export import list_models, write_model, write_plain_model
from DeBERTa.hub.model_card import read_record
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.training.checkpoint import (
    find_newest_valid,
    get_checkpoint_path,
    list_steps,
    rename_damaged,
    write_json,
)
from DeBERTa.training.optimizer import count_warmup_steps
from DeBERTa.training.run_lock import LOCK, RunLock
from DeBERTa.training.worker import LOGS

FRESH = ".fresh"  # names the command whose --fresh has moved the previous run

logger = logging.getLogger(__name__)

# Flags that name what the run reads.
INPUTS = (
    *("data_dir", "vocab_path", "replay", "model_config"),
    *("init_model", "init_generator", "init_discriminator", "resize_vocab"),
)
# By section of the settings, what a difference in it means.
WARNINGS = {
    "code": "resuming with other code: %s; results may differ from here on",
    "validation": "resuming with another validation split: %s; the best checkpoint is chosen, and forgetting "
    "measured, among evaluations on one split, the newest; to keep the one that best.json names now, copy it",
}


def open_run_dir(
    run_dir: Path, settings: dict, environment: dict, fresh: bool, launch: str = ""
) -> tuple[int, RunLock]:
    """Create or reopen the run directory and lock it.

    Returns the step to resume from, or 0, and the lock. Writes settings and environment there. `launch` names
    the command: with `fresh`, a restart of its workers does not move its own files. Raises `StorageError`
    when the directory cannot be written, and `ConfigError` when another process trains in it, its run has
    other settings, or none of its checkpoints is valid.
    """
    what = f"the run directory {run_dir}"
    with raise_storage_errors(run_dir, what, "give another --output_dir", "--output_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        check_file_types(run_dir)
        lock = RunLock(run_dir)
        moved = run_dir / FRESH
        if fresh and not (launch and moved.is_file() and read_file(moved) == launch.encode()):
            inputs = (settings["train"].get(name) for name in INPUTS)
            move_previous_run(run_dir, [Path(path) for path in inputs if path])
            if launch:
                with open_atomic(moved) as file:
                    file.write(launch.encode())
        step, damages = find_newest_valid(run_dir)
        if step:
            saved = read_json(get_checkpoint_path(run_dir, step) / "config.json")
            check_same_run(saved, settings, run_dir, step)
        remove_unfinished(run_dir)
        for damage in damages:
            logger.warning("damaged checkpoint: %s", damage)
        for newer in (other for other in list_steps(run_dir) if other > step):
            renamed = rename_damaged(get_checkpoint_path(run_dir, newer))
            logger.warning("resuming from step %d instead; step %d is now %s", step, newer, renamed)
        write_json(run_dir / "config.json", settings)
        write_json(run_dir / "environment.json", environment)
    return step, lock


def check_file_types(run_dir: Path) -> None:
    """Raise `StorageError` for a file of another type than the run writes.

    Opening or reading a pipe or a device might never end; a linked lock would overwrite another file.
    """
    for path in (*run_dir.iterdir(), run_dir / "checkpoints" / "best.json"):
        is_right, problem = path.is_file() or path.is_dir() or not path.exists(), "is a pipe or a device"
        if path.name == "checkpoints":
            is_right, problem = path.is_dir(), "must be a directory"
        elif path.name == LOCK:
            is_right = path.is_file() and not path.is_symlink()
            problem = "must be a file, which no link may stand for"
        if not is_right:
            raise StorageError(f"{path} {problem}; remove it")


def move_previous_run(run_dir: Path, inputs: list[Path]) -> None:
    """Move everything but the open log files to `RUN_DIR.old-1` (-2, ...).

    Where the run directory is a mount point or its parent cannot be written, the target is `RUN_DIR/old-1`.
    Raises `ConfigError` when `inputs` or the current directory would be moved.
    """
    previous = [
        path
        for path in sorted(run_dir.iterdir())
        if path.name not in (LOGS, LOCK, FRESH) and not re.fullmatch(r"old-\d+", path.name)
    ]
    if not previous:
        return
    real = run_dir.resolve()
    if used := [path for path in (Path.cwd(), *inputs) if path.resolve().is_relative_to(real)]:
        raise ConfigError(
            f"--fresh would move {used[0]}, which is in use, with the other files of {real}; give another "
            "--output_dir"
        )
    target = find_unused_path(real.with_name(real.name + ".old"))
    try:
        target.mkdir()
        previous[0].rename(target / previous[0].name)
    except OSError:
        with suppress(OSError):
            target.rmdir()
        target = find_unused_path(run_dir / "old")
        target.mkdir()
        previous[0].rename(target / previous[0].name)
    for path in previous[1:]:
        path.rename(target / path.name)
    logger.info("--fresh: the previous files of %s are now in %s", run_dir, target)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed process has not fully written or removed.

    That is checkpoints and files.
    """
    for pattern in ("checkpoints/step-*.tmp", "checkpoints/*.part", "*.part"):
        for path in run_dir.glob(pattern):
            logger.info("removing %s, which a killed run left unfinished", path)
            remove(path)


def check_same_run(saved: dict, current: dict, run_dir: Path, step: int = 0) -> None:
    """Raise `ConfigError` for settings that differ from those of the saved run.

    It names them; the run was saved after `step`. A run may be made longer. Settings that another version of
    this package added or removed are not compared. Versions without `--kernels` computed as `auto` does.
    Earlier versions recorded `attention_head_size` 0 for the usual one, which follows from the other sizes.
    Other code and another validation split are warnings.
    """
    differing: list[str] = []
    for section in ("train", "model", "data"):
        if not isinstance(saved.get(section), dict):
            raise DamagedCheckpointError(
                f"config.json of the newest checkpoint in {run_dir} has no section {section!r}; remove this "
                "checkpoint to resume from the one before"
            )
        old, new = flatten(saved[section]), flatten(current[section])
        if section == "train":
            old = omit_length({"kernels": "auto", "lr_schedule": "linear"} | old, new)
        old = {key: value for key, value in old.items() if value or not key.endswith("attention_head_size")}
        differing += list_differences(old, new, FREE_TO_CHANGE if section == "train" else ())
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {', '.join(differing)}; "
            "give another --tag or --output_dir, or the settings of that run to resume it"
        )
    steps, more = (run["train"].get("num_training_steps", 0) for run in (saved, current))
    if steps and steps != more:
        text = "the run of %d steps is made longer: from step %d on, its schedule is that of %d steps"
        logger.info(text, steps, step, more)
    for section, message in WARNINGS.items():
        if differing := list_differences(saved.get(section) or {}, current[section]):
            logger.warning(message, ", ".join(differing))


def omit_length(old: dict, new: dict) -> dict:
    """Return the saved flags without number of steps and warm-up that may differ.

    The number of steps may be larger now, and the warm-up is omitted if it is equal. A longer run has the
    warm-up of the shorter one as it was given. Otherwise, steps and a proportion may be equal. Earlier
    versions recorded a proportion in steps, as an int.
    """
    steps, more = old.get("num_training_steps"), new.get("num_training_steps", 0)
    if not isinstance(steps, int) or more < steps:
        return old
    omitted, warmup = ["num_training_steps"], old.get("warmup")
    if isinstance(warmup, int) or (isinstance(warmup, float) and more == steps):
        is_equal = count_warmup_steps(warmup, steps) == count_warmup_steps(new["warmup"], steps)
        omitted += ["warmup"] * is_equal
    return {name: value for name, value in old.items() if name not in omitted}


def list_differences(old: dict, new: dict, ignored: Collection[str] = ()) -> list[str]:
    """Describe the values that differ, of the names that both have."""
    return [
        f"{name} ({format_value(old[name])} there, {format_value(new[name])} here)"
        for name in sorted((old.keys() & new.keys()) - set(ignored))
        if old[name] != new[name]
    ]


def format_value(value: object) -> object:
    """Return the value of a setting as a message shows it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def flatten(values: dict, prefix: str = "") -> dict:
    """Return nested dicts as one dict with dotted keys."""
    result: dict = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def check_disk_space(run_dir: Path, model: nn.Module, remaining: int, keep_last: int) -> int:
    """Return the bytes that checkpoints and final models need on the disk.

    Of the `remaining` checkpoints, those count that are not pruned. Raises `StorageError` if one and the
    final models do not fit. Logs a warning if the others do not.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    final = weights  # full tables of a discriminator are as large as its residuals; under ES it has none
    if isinstance(model, RTDModel) and model.config.embedding_sharing == "es":
        final += sum(table.nbytes for table in model.generator.get_tables())
    checkpoint, free = weights + moments, shutil.disk_usage(run_dir).free
    sizes = f"the disk of {run_dir} has {format_megabytes(free)} free"
    if free < checkpoint + final:
        raise StorageError(
            f"{sizes}, but one checkpoint ({format_megabytes(checkpoint)}) and the final models "
            f"({format_megabytes(final)}) need {format_megabytes(checkpoint + final)}; make room there or "
            "give another --output_dir"
        )
    # The newest ones, the best one, and the one that is being written.
    needed = min(remaining, max(keep_last + 2 - len(list_steps(run_dir)), 1))
    room = int((free - final) / checkpoint)
    if room < needed:
        rest = f"room for {room} of {needed} more checkpoints ({format_megabytes(checkpoint)} each)"
        logger.warning("%s: %s; make room there, or save fewer with --keep_last", sizes, rest)
    return needed * checkpoint + final


def format_megabytes(size: float) -> str:
    """Format a number of bytes in MB (10^6)."""
    return f"{size / 1e6:,.1f} MB"


def save_models(run_dir: Path, model: MaskedLanguageModel | RTDModel, vocabulary: Path) -> list[Path]:
    """Write trained models as transformers opens them; return their directories.

    What transformers does not have is written for this package alone, with a warning. Raises `StorageError`
    when the disk is full; the same command then writes them again.
    """
    models, tokenizer, run = list_models(model), Tokenizer(vocabulary), read_record(run_dir)
    try:
        for exported in models:
            directory = run_dir / exported.name
            try:
                write_model(exported, directory, tokenizer, run)
            except (ConfigError, VocabularyError) as error:
                logger.warning("%s; %s is for this package alone", error, directory)
                write_plain_model(exported, directory, vocabulary)
    except OSError as error:
        error.filename = error.filename or str(run_dir)
        raise StorageError(
            f"cannot write the final model: {describe_os_error(error, 'make it writable')}, then the same "
            "command writes it without training again"
        ) from error
    return [run_dir / exported.name for exported in models]
