"""The folder of a run: opening it, going on with what is there, starting over, and the final models.

model/ (MLM), or generator/ and discriminator/ (RTD):
                          model.safetensors   weights under the published names, tables whole
                          config.json         model config
                          spm.model           vocabulary
"""

import errno
import fcntl
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from DeBERTa.config import FREE_TO_CHANGE, read_json
from DeBERTa.data.files import find_unused_path, sync
from DeBERTa.errors import ConfigError
from DeBERTa.model.pretraining import RTDModel
from DeBERTa.training.checkpoint import (
    find_newest_valid,
    format_megabytes,
    get_checkpoint_path,
    list_steps,
    rename_damaged,
    write_json,
)
from DeBERTa.training.distributed import LOGS

LOCK = ".lock"
locks: list[TextIO] = []  # open, and with them held, until this process ends, however it does


def open_run_folder(run_dir: Path, settings: dict, environment: dict, fresh: bool) -> int:
    """Make the folder, or go on with the run in it: returns the step of the checkpoint to load, 0 for none.

    Settings and environment are written there. Raises `ConfigError` when the folder cannot be written, is another
    process's, holds a run with other settings, or has checkpoints of which none is whole.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock_run_folder(run_dir)
        # The logs of the processes stay: they are being written.
        left = [path for path in run_dir.glob("*") if path.name not in (LOGS, LOCK)]
        if fresh and left:
            old = find_unused_path(run_dir.with_name(run_dir.name + ".old"))
            old.mkdir()
            for path in left:
                path.rename(old / path.name)
            print(f"--fresh: what was in {run_dir} is now in {old}", file=sys.stderr)
        step, damages = find_newest_valid(run_dir)
        if step:
            check_same_run(read_json(get_checkpoint_path(run_dir, step) / "config.json"), settings, run_dir)
        remove_unfinished(run_dir)
        for damage in damages:
            print(f"warning: damaged checkpoint: {damage}", file=sys.stderr)
        for newer in [saved for saved in list_steps(run_dir) if saved > step]:
            aside = rename_damaged(get_checkpoint_path(run_dir, newer))
            print(
                f"warning: going on from step {step} instead; step {newer} is kept as {aside}",
                file=sys.stderr,
            )
        write_json(run_dir / "config.json", settings)
        write_json(run_dir / "environment.json", environment)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(
            f"cannot write the run's folder {run_dir}: {reason}; give another --output_dir"
        ) from None
    return step


def lock_run_folder(run_dir: Path) -> None:
    """Keep other processes from training in `run_dir` until this one ends. Raises `ConfigError` when one does already.

    A record lock: it ends with the process, is not inherited by data workers, and holds between the machines of a
    network file system. Where a file system has no locks, nothing is held.
    """
    file = (run_dir / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        raise ConfigError(
            f"another process ({file.read().strip()}) is training in {run_dir}: stop it, or give another --tag"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    locks.append(file)


def remove_unfinished(run_dir: Path) -> None:
    """Checkpoints that a killed process had not written to their end, or not removed to its end."""
    for path in (run_dir / "checkpoints").glob("step-*.tmp"):
        print(f"removing {path}, which a run that was killed left unfinished", file=sys.stderr)
        shutil.rmtree(path)


def check_same_run(saved: dict, current: dict, run_dir: Path) -> None:
    """Raise `ConfigError` naming the settings in which the run in `run_dir` differs from the one asked for."""
    differing = []
    for section in ("train", "model", "data"):
        old, new = flat(saved.get(section, {})), flat(current[section])
        for key in sorted((old.keys() | new.keys()) - FREE_TO_CHANGE):
            if old.get(key) != new.get(key):
                differing.append(f"{key} ({old.get(key)} there, {new.get(key)} here)")
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {', '.join(differing)}; "
            "give another --tag or --output_dir, or the settings of that run to go on with it"
        )


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one, with dotted keys."""
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def check_room(run_dir: Path, model: nn.Module, coming: int, keep_last: int) -> None:
    """Raise `ConfigError` unless the disk has room for one checkpoint more and the final models.

    Warns when it has none for what the rest of the run will keep of `coming` checkpoints.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    final = weights  # the whole tables of a discriminator are as large as its residuals; under ES it has none
    if isinstance(model, RTDModel) and model.config.embedding_sharing == "es":
        final += sum(table.numel() * table.element_size() for table in model.generator.tables())
    needed, free = weights + moments + final, shutil.disk_usage(run_dir).free
    if free < needed:
        raise ConfigError(
            f"{run_dir} is on a disk with {format_megabytes(free)} free, but one checkpoint ({format_megabytes(weights + moments)}) "
            f"and the final models ({format_megabytes(final)}) need {format_megabytes(needed)}; "
            "make room there or give another --output_dir"
        )
    # The newest ones, the best, and the one that is being written.
    kept = min(coming, max(keep_last + 2 - len(list_steps(run_dir)), 1))
    room = int((free - final) / (weights + moments))
    if room < kept:
        print(
            f"warning: {run_dir} is on a disk with {format_megabytes(free)} free: room for {room} of {kept} checkpoints "
            f"to come ({format_megabytes(weights + moments)} each); make room there, or keep fewer with --keep_last",
            file=sys.stderr,
        )


def save_models(run_dir: Path, model: nn.Module, vocabulary: Path) -> list[Path]:
    """Write the trained models for use elsewhere, each with its config and vocabulary; returns their folders.

    Raises `ConfigError` when the disk is full; the same command tries again.
    """
    if isinstance(model, RTDModel):
        parts = {
            "generator": (model.generator.state_dict(), model.config.generator),
            "discriminator": (model.standalone_discriminator(), model.config.discriminator),
        }
    else:
        parts = {"model": (model.state_dict(), model.config)}
    for name, (state, config) in parts.items():
        folder = run_dir / name
        temporary = folder / "model.safetensors.tmp"
        try:
            folder.mkdir(exist_ok=True)
            save_file(_on_host(state), temporary)
            sync(temporary)
            temporary.replace(folder / "model.safetensors")
            write_json(folder / "config.json", config.to_dict())
            shutil.copyfile(vocabulary, folder / "spm.model")
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ConfigError(
                f"the final model cannot be written to {folder}: {error}; "
                "make room there, then the same command writes it without training again"
            ) from None
    return [run_dir / name for name in parts]


def _on_host(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
