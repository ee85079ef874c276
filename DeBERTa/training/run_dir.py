"""The run directory: opening it, resuming or starting over, and the final models.

model/ (MLM), or generator/ and discriminator/ (RTD):
                          model.safetensors   weights under the published names, with full tables
                          config.json         model config
                          spm.model           vocabulary
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from DeBERTa.config import FREE_TO_CHANGE, ModelConfig, read_json
from DeBERTa.data.files import find_unused_path, sync
from DeBERTa.errors import ConfigError, StorageError
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.training.checkpoint import (
    find_newest_valid,
    format_megabytes,
    get_checkpoint_path,
    list_steps,
    rename_damaged,
    write_json,
)
from DeBERTa.training.worker import LOGS

logger = logging.getLogger(__name__)

LOCK = ".lock"
locks: list[TextIO] = []  # open files; their locks are held until this process ends


def open_run_dir(run_dir: Path, settings: dict, environment: dict, fresh: bool) -> int:
    """Create or reopen the run directory, and return the step to resume from, or 0.

    Writes settings and environment there. Raises `StorageError` when the directory cannot be written, and
    `ConfigError` when another process trains in it, its run has other settings, or none of its checkpoints
    is valid.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock_run_dir(run_dir)
        if fresh:
            move_previous_run(run_dir)
        step, damages = find_newest_valid(run_dir)
        if step:
            check_same_run(read_json(get_checkpoint_path(run_dir, step) / "config.json"), settings, run_dir)
        remove_unfinished(run_dir)
        for damage in damages:
            logger.warning("damaged checkpoint: %s", damage)
        for newer in [saved for saved in list_steps(run_dir) if saved > step]:
            renamed = rename_damaged(get_checkpoint_path(run_dir, newer))
            logger.warning("resuming from step %d instead; step %d is now %s", step, newer, renamed)
        write_json(run_dir / "config.json", settings)
        write_json(run_dir / "environment.json", environment)
    except OSError as error:
        raise StorageError(
            f"cannot write the run directory {run_dir}: {error.strerror}; give another --output_dir"
        ) from error
    return step


def lock_run_dir(run_dir: Path) -> None:
    """Lock `run_dir` against other training processes until this one ends.

    Raises `ConfigError` when another process trains there. The lock is a record lock: it ends with the
    process, data workers do not inherit it, and it excludes other machines on a network file system. Without
    file locks nothing is locked.
    """
    file = (run_dir / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        holder = file.read().strip()
        raise ConfigError(
            f"another process ({holder}) is training in {run_dir}: stop it, or give another --tag"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    locks.append(file)


def move_previous_run(run_dir: Path) -> None:
    """Move everything but the open log files to `RUN_DIR.old-1` (-2, ...)."""
    previous = [path for path in run_dir.glob("*") if path.name not in (LOGS, LOCK)]
    if previous:
        target = find_unused_path(run_dir.with_name(run_dir.name + ".old"))
        target.mkdir()
        for path in previous:
            path.rename(target / path.name)
        logger.info("--fresh: the previous files of %s are now in %s", run_dir, target)


def remove_unfinished(run_dir: Path) -> None:
    """Remove checkpoints that a killed process has not fully written or removed."""
    for path in (run_dir / "checkpoints").glob("step-*.tmp"):
        logger.info("removing %s, which a killed run left unfinished", path)
        shutil.rmtree(path)


def check_same_run(saved: dict, current: dict, run_dir: Path) -> None:
    """Raise `ConfigError` naming the settings that differ from the saved run's.

    Settings that another version of this package added or removed are not compared. Versions without
    `--kernels` computed as `auto` does. Earlier versions recorded `attention_head_size` 0 for the usual one,
    which follows from the other sizes.
    """
    differing: list[str] = []
    for section in ("train", "model", "data"):
        old, new = flatten(saved.get(section, {})), flatten(current[section])
        if section == "train":
            old = {"kernels": "auto"} | old
        differing += [
            f"{key} ({old[key]} there, {new[key]} here)"
            for key in sorted((old.keys() & new.keys()) - FREE_TO_CHANGE)
            if old[key] != new[key] and not (key.endswith("attention_head_size") and old[key] == 0)
        ]
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {', '.join(differing)}; "
            "give another --tag or --output_dir, or the settings of that run to resume it"
        )


def flatten(values: dict, prefix: str = "") -> dict:
    """Return nested dicts as one dict with dotted keys."""
    result: dict = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def check_disk_space(run_dir: Path, model: nn.Module, remaining: int, keep_last: int) -> None:
    """Raise `StorageError` if a checkpoint and the final models do not fit the disk.

    Logs a warning when it lacks space for those of the `remaining` checkpoints that will not be pruned.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    final = weights  # full tables of a discriminator are as large as its residuals; under ES it has none
    if isinstance(model, RTDModel) and model.config.embedding_sharing == "es":
        final += sum(table.nbytes for table in model.generator.tables())
    checkpoint, free = weights + moments, shutil.disk_usage(run_dir).free
    if free < checkpoint + final:
        raise StorageError(
            f"the disk of {run_dir} has {format_megabytes(free)} free, but one checkpoint "
            f"({format_megabytes(checkpoint)}) and the final models ({format_megabytes(final)}) need "
            f"{format_megabytes(checkpoint + final)}; "
            "make room there or give another --output_dir"
        )
    # The newest ones, the best one, and the one that is being written.
    needed = min(remaining, max(keep_last + 2 - len(list_steps(run_dir)), 1))
    room = int((free - final) / checkpoint)
    if room < needed:
        logger.warning(
            "the disk of %s has %s free: room for %d of %d more checkpoints (%s each); "
            "make room there, or save fewer with --keep_last",
            run_dir, format_megabytes(free), room, needed, format_megabytes(checkpoint),
        )  # fmt: skip


def save_models(run_dir: Path, model: MaskedLanguageModel | RTDModel, vocabulary: Path) -> list[Path]:
    """Write the trained models with config and vocabulary, and return their paths.

    Raises `StorageError` when the disk is full; the same command then writes them again.
    """
    models: dict[str, tuple[dict, ModelConfig]]
    if isinstance(model, RTDModel):
        models = {
            "generator": (model.generator.state_dict(), model.config.generator),
            "discriminator": (model.merge_discriminator(), model.config.discriminator),
        }
    else:
        models = {"model": (model.state_dict(), model.config)}
    for name, (state, config) in models.items():
        directory = run_dir / name
        temporary = directory / "model.safetensors.tmp"
        try:
            directory.mkdir(exist_ok=True)
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, temporary)
            sync(temporary)
            temporary.replace(directory / "model.safetensors")
            write_json(directory / "config.json", config.to_dict())
            shutil.copyfile(vocabulary, directory / "spm.model")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise StorageError(
                f"cannot write the final model to {directory}: {error}; "
                "make room there, then the same command writes it without training again"
            ) from error
    return [run_dir / name for name in models]
