"""Checkpoints: the state a run needs to resume, written atomically.

    checkpoints/step-00010000/
        model.safetensors   weights, residuals of shared tables included
        optimizer.pt        moments, loss scaler, windows of losses, sums of the logging interval
        state.json          step, seed, position in the data, versions (informative)
        config.json         settings, model, data and vocabulary fingerprints
        manifest.json       size and SHA-256 of the files above

A checkpoint is written to a temporary directory: the files, then the manifest, each synced to disk. Then the
directory is renamed. Random numbers are functions of (seed, step, rank or row), so that no state of a random
number generator is saved.
"""

import contextlib
import json
import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from DeBERTa.data.files import (
    describe_free_space,
    find_unused_path,
    hash_file,
    name_file,
    open_atomic,
    remove,
    sync,
)
from DeBERTa.errors import DamagedCheckpointError, StorageError, describe_os_error
from DeBERTa.hub.published import select_weights
from DeBERTa.hub.weights import read_weights, write_tensors
from DeBERTa.training.run_lock import RunLock

FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.json")
MANIFEST = "manifest.json"
HASH_CHUNK_BYTES = 16 << 20
MAX_JSON_BYTES = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """State of a run after `step` updates, copied to host memory.

    Training continues while it is written.
    """

    step: int
    model: dict[str, torch.Tensor]
    training: dict
    state: dict
    settings: dict


def get_checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps of all complete checkpoints, oldest first."""
    names = {path.name for path in (run_dir / "checkpoints").glob("step-*")}
    steps = {int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name)}
    return sorted(step for step in steps if get_checkpoint_path(run_dir, step).name in names)


def write_checkpoint(
    run_dir: Path, snapshot: Snapshot, keep_last: int, best: int | None, lock: RunLock | None = None
) -> Path:
    """Write the checkpoint, then remove older ones.

    The newest `keep_last` and that of step `best` remain. Raises `StorageError` when the disk is full or not
    writable, and when the run directory is no longer the one that `lock` locks. The incomplete checkpoint is
    removed, but nothing in the directory of another run.
    """
    path = get_checkpoint_path(run_dir, snapshot.step)
    temporary = path.with_name(path.name + ".tmp")
    check_lock = lock.check if lock else lambda: None
    check_lock()
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        _write_files(temporary, snapshot)
        check_lock()
        if os.path.lexists(path):  # written by another process that shares the directory without a lock
            rename_damaged(path)
        temporary.rename(path)
        sync(path.parent)
        sync(run_dir)
    except OSError as error:
        check_lock()
        with contextlib.suppress(OSError):
            remove(temporary)
        raise StorageError(_describe_failure(run_dir, snapshot.step, error)) from error
    prune(run_dir, snapshot.step, keep_last, best)
    return path


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    write_tensors(snapshot.model, folder / "model.safetensors")
    with name_file(folder / "optimizer.pt") as path, path.open("wb") as file:
        torch.save(snapshot.training, file)
    for name, values in (("state.json", snapshot.state), ("config.json", snapshot.settings)):
        with name_file(folder / name) as path:
            path.write_text(_to_json(values))
    for name in FILES:
        with name_file(folder / name) as path:
            sync(path)
    write_manifest(folder, snapshot.step)
    sync(folder)


def write_manifest(folder: Path, step: int) -> None:
    """Record size and SHA-256 of the files in `folder`, for `verify`."""
    entries = [
        {
            "name": name,
            "size": (folder / name).stat().st_size,
            "sha256": hash_file(folder / name, HASH_CHUNK_BYTES),
        }
        for name in FILES
    ]
    with name_file(folder / MANIFEST) as path:
        path.write_text(_to_json({"step": step, "files": entries}))
        sync(path)


def _describe_failure(run_dir: Path, step: int, error: OSError) -> str:
    older = [saved for saved in list_steps(run_dir) if saved != step]
    resume = f"; the same command resumes from step {older[-1]}" if older else ""
    return (
        f"cannot write the checkpoint of step {step} to {run_dir / 'checkpoints'}: "
        f"{describe_os_error(error)}{describe_free_space(run_dir)}; "
        f"free space there, or move the run directory and give its new path as --output_dir{resume}"
    )


def format_megabytes(size: float) -> str:
    """Format a number of bytes in MB (10^6)."""
    return f"{size / 1e6:,.1f} MB"


def prune(run_dir: Path, step: int, keep_last: int, best: int | None) -> None:
    """Remove checkpoints up to `step` except the newest `keep_last` and `best`."""
    for old in [saved for saved in list_steps(run_dir) if saved <= step][:-keep_last]:
        if old != best:
            # Renamed first: a partly removed checkpoint must not look complete.
            path = get_checkpoint_path(run_dir, old)
            temporary = path.with_name(path.name + ".tmp")
            try:
                remove(temporary)
                path.rename(temporary)
                remove(temporary)
            except OSError as error:
                logger.warning("cannot remove an old checkpoint: %s", describe_os_error(error))


def verify(folder: Path) -> None:
    """Raise `DamagedCheckpointError` unless the manifest is of this step and all files match it.

    The message names the file that is missing or differs. Only files with known names are read.
    """
    path = folder / MANIFEST
    try:
        _check_is_file(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedCheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        manifest = json.loads(path.read_bytes())
        entries = {entry["name"]: (entry["size"], entry["sha256"]) for entry in manifest["files"]}
        if get_checkpoint_path(folder, manifest["step"]).name != folder.name:
            raise DamagedCheckpointError(
                f"{folder} holds the checkpoint of step {manifest['step']}: it was copied or renamed ({path})"
            )
        for name in FILES:
            path = folder / name
            _check_is_file(path)
            size, sha256 = entries[name]
            found = path.stat().st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found} bytes, but {size} were written")
            if hash_file(path, HASH_CHUNK_BYTES) != sha256:
                raise DamagedCheckpointError(f"{path} differs from what was written (SHA-256)")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedCheckpointError(f"{folder / MANIFEST} cannot be read") from None


def _check_is_file(path: Path) -> None:
    """Raise `DamagedCheckpointError` for a device or a pipe, which reading might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedCheckpointError(f"{path} is not a file")


def find_damage(folder: Path) -> DamagedCheckpointError | None:
    """Return the error that `verify` raises, or None if the checkpoint is valid."""
    try:
        verify(folder)
    except DamagedCheckpointError as error:
        return error
    return None


def find_newest_valid(run_dir: Path) -> tuple[int, list[DamagedCheckpointError]]:
    """Return the step of the newest valid checkpoint, and the errors of newer ones.

    The step is 0 when there are no checkpoints. Raises `DamagedCheckpointError` when there are checkpoints,
    but none is valid.
    """
    damages: list[DamagedCheckpointError] = []
    for step in reversed(list_steps(run_dir)):
        damage = find_damage(get_checkpoint_path(run_dir, step))
        if damage is None:
            return step, damages
        damages.append(damage)
    if damages:
        raise DamagedCheckpointError(
            f"none of the checkpoints in {run_dir / 'checkpoints'} is valid: {'; '.join(map(str, damages))}; "
            "restore one of them, or give --fresh to start over (the old files are moved, not removed)"
        )
    return 0, damages


def rename_damaged(folder: Path) -> Path:
    """Rename a damaged checkpoint and return the new path.

    Under its new name it is no longer listed among the checkpoints of the run.
    """
    renamed = find_unused_path(folder.with_name(f"damaged-{folder.name}"))
    folder.rename(renamed)
    return renamed


def read_model(run_dir: Path, step: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read the weights of `step`, by the names of `model.state_dict()`.

    Raises `ConfigError` when they belong to another model.
    """
    path = get_checkpoint_path(run_dir, step) / "model.safetensors"
    return select_weights(model, read_weights(path), path)


def read_training(run_dir: Path, step: int) -> dict:
    """Read `Snapshot.training` without executing code from the file."""
    path = get_checkpoint_path(run_dir, step) / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any kind, for bytes that were not written by torch.save
        raise DamagedCheckpointError(
            f"{path} cannot be read; remove {path.parent} to resume from the checkpoint before"
        ) from error


def write_json(path: Path, values: dict) -> None:
    """Replace a file atomically by `values` as indented JSON."""
    with open_atomic(path) as file:
        file.write(_to_json(values).encode())


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"
