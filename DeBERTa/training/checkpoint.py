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
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from DeBERTa.data.files import find_unused_path, hash_file, open_atomic, sync
from DeBERTa.errors import DamagedCheckpointError, StorageError
from DeBERTa.hub.published import read_weights, select_weights

FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.json")
MANIFEST = "manifest.json"
HASH_CHUNK_BYTES = 16 << 20


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
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def write_checkpoint(run_dir: Path, snapshot: Snapshot, keep_last: int, best: int | None) -> Path:
    """Write the checkpoint, then remove older ones.

    The newest `keep_last` and that of step `best` remain. Raises `StorageError` when the disk is full or not
    writable; the incomplete checkpoint is removed.
    """
    path = get_checkpoint_path(run_dir, snapshot.step)
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, snapshot)
        if path.exists():  # written by another process that shares the directory without a lock
            rename_damaged(path)
        temporary.rename(path)
        sync(path.parent)
        sync(run_dir)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(_describe_failure(run_dir, snapshot.step, error)) from error
    prune(run_dir, snapshot.step, keep_last, best)
    return path


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    save_file(snapshot.model, folder / "model.safetensors")
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save(snapshot.training, file)
    (folder / "state.json").write_text(_to_json(snapshot.state))
    (folder / "config.json").write_text(_to_json(snapshot.settings))
    for name in FILES:
        sync(folder / name)
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
    (folder / MANIFEST).write_text(_to_json({"step": step, "files": entries}))
    sync(folder / MANIFEST)


def _describe_failure(run_dir: Path, step: int, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({format_megabytes(shutil.disk_usage(run_dir).free)} free)"
    older = [saved for saved in list_steps(run_dir) if saved != step]
    resume = f"; the same command resumes from step {older[-1]}" if older else ""
    return (
        f"cannot write the checkpoint of step {step} to {run_dir / 'checkpoints'}: {reason}{free}; "
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
            shutil.rmtree(temporary, ignore_errors=True)
            path.rename(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path) -> None:
    """Raise `DamagedCheckpointError` unless all files match the manifest.

    The message names the file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        entries = {entry["name"]: (entry["size"], entry["sha256"]) for entry in manifest["files"]}
        for name in FILES:
            path = folder / name
            size, sha256 = entries[name]
            found = path.stat().st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found} bytes, but {size} were written")
            if hash_file(path, HASH_CHUNK_BYTES) != sha256:
                raise DamagedCheckpointError(f"{path} differs from what was written (SHA-256)")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpointError(f"{folder / MANIFEST} cannot be read") from None


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        raise DamagedCheckpointError(
            f"{path} cannot be read; remove {path.parent} to resume from the checkpoint before"
        ) from None


def write_json(path: Path, values: dict) -> None:
    """Replace a file atomically by `values` as indented JSON."""
    with open_atomic(path) as file:
        file.write(_to_json(values).encode())


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"
