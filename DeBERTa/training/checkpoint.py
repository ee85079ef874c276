"""Checkpoints: the state a run needs to resume, written atomically.

    checkpoints/step-00010000/
        model.safetensors   weights, residuals of shared tables included
        optimizer.pt        moments, loss scaler, windows of losses, sums of the logging interval
        state.json          step, elapsed seconds; for the reader: seed, epoch, ranks, skipped steps, versions
        config.json         settings, model config, fingerprints of data, vocabulary and code
        manifest.json       size and SHA-256 of the files above

A checkpoint is written to a temporary directory: the files, then the manifest, each synced to disk. Then the
directory is renamed. A thread does this while training continues. `checkpoints/best.json` records the best
checkpoint by validation loss, which pruning does not remove. Random numbers are functions of (seed, step,
rank or row), so that no state of a random number generator is saved.
"""

import contextlib
import json
import logging
import math
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from DeBERTa.errors import DamagedCheckpointError, StorageError, describe_os_error
from DeBERTa.files import (
    find_unused_path,
    hash_file,
    name_file,
    open_atomic,
    remove,
    sync,
)
from DeBERTa.hub.published import select_weights
from DeBERTa.hub.weights import read_weights, write_tensors

FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.json")
MANIFEST = "manifest.json"
NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
BEST_BY = ("discriminator_loss", "loss")  # the first that an evaluation has
NICENESS = 10  # of the thread that writes, of -20 to 19
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
    paths = (run_dir / "checkpoints").glob("step-*")
    return sorted(int(found[1]) for path in paths if (found := NAME.fullmatch(path.name)))


def write_checkpoint(
    run_dir: Path,
    snapshot: Snapshot,
    keep_last: int,
    best: int | None,
    check_lock: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint, then remove older ones.

    The newest `keep_last` and that of step `best` remain. Raises `StorageError` when the disk is full or not
    writable. `check_lock` raises it when the run directory is no longer that of this run. The incomplete
    checkpoint is removed, but nothing in the directory of another run.
    """
    path = get_checkpoint_path(run_dir, snapshot.step)
    temporary = path.with_name(path.name + ".tmp")
    check_lock()
    try:
        remove(temporary)
        path.parent.mkdir(exist_ok=True)
        temporary.mkdir()
        _write_files(temporary, snapshot)
        check_lock()
        if os.path.lexists(path):  # written by another process that shares the directory without a lock
            rename_damaged(path)
        temporary.rename(path)
        sync(path.parent)
        sync(run_dir)
    except OSError as error:
        check_lock()
        error.filename = error.filename or str(run_dir)
        advice = "move the run directory and give its new path as --output_dir"
        reason = describe_os_error(error, advice, "--output_dir")  # its free space is that of the failure
        older: list[int] = []
        with contextlib.suppress(OSError):
            older = [saved for saved in list_steps(run_dir) if saved != snapshot.step]
            remove(temporary)
        resume = f"; the same command resumes from step {older[-1]}" if older else ""
        raise StorageError(
            f"cannot write the checkpoint of step {snapshot.step} to {path.parent}: {reason}{resume}"
        ) from error
    prune(run_dir, snapshot.step, keep_last, best)
    return path


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    write_tensors(snapshot.model, folder / "model.safetensors")
    with name_file(folder / "optimizer.pt") as path, path.open("wb") as file:
        torch.save(snapshot.training, file)
    for name, values in (("state.json", snapshot.state), ("config.json", snapshot.settings)):
        with name_file(folder / name) as path:
            path.write_text(_to_json(values))
    write_manifest(folder, snapshot.step)
    for name in (*FILES, MANIFEST):
        with name_file(folder / name) as path:
            sync(path)
    sync(folder)


def write_manifest(folder: Path, step: int) -> None:
    """Record size and SHA-256 of the files in `folder`, for `verify`."""
    entries = [
        {"name": name, "size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
        for name in FILES
    ]
    with name_file(folder / MANIFEST) as path:
        path.write_text(_to_json({"step": step, "files": entries}))


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
    """Raise `DamagedCheckpointError` unless all files match the manifest.

    They also have to be of this step. The message names the file that is missing or differs. Only files with
    known names are read.
    """
    path = folder / MANIFEST
    try:
        if _get_size(path) > MAX_JSON_BYTES:
            raise DamagedCheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        manifest = json.loads(path.read_bytes())
        entries = {entry["name"]: (entry["size"], entry["sha256"]) for entry in manifest["files"]}
        wanted = [(folder / name, *entries[name]) for name in FILES]
        _check_step(path, manifest)
        for path, size, sha256 in wanted:
            found = _get_size(path)
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found} bytes, but {size} were written")
            if hash_file(path) != sha256:
                raise DamagedCheckpointError(f"{path} differs from what was written (SHA-256)")
        path = folder / "state.json"
        _check_step(path, json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedCheckpointError(f"{path} cannot be read") from None


def _check_step(path: Path, values: dict) -> None:
    """Raise `DamagedCheckpointError` unless a file is of its directory's step."""
    if get_checkpoint_path(path.parent, values["step"]).name != path.parent.name:
        raise DamagedCheckpointError(
            f"{path.parent} holds the checkpoint of step {values['step']}: it was copied or renamed ({path})"
        )


def _get_size(path: Path) -> int:
    """Return the size of a file.

    Raises `DamagedCheckpointError` for a device or a pipe, which reading might never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpointError(f"{path} is not a file")
    return status.st_size


def find_newest_valid(run_dir: Path) -> tuple[int, list[DamagedCheckpointError]]:
    """Return the step of the newest valid checkpoint, and the errors of newer ones.

    The step is 0 when there are no checkpoints. Raises `DamagedCheckpointError` when there are checkpoints,
    but none is valid.
    """
    damages: list[DamagedCheckpointError] = []
    for step in reversed(list_steps(run_dir)):
        try:
            verify(get_checkpoint_path(run_dir, step))
        except DamagedCheckpointError as error:  # noqa: PERF203 (verifying takes longer by far)
            damages.append(error)
        else:
            return step, damages
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
    with open_atomic(path, parents=False) as file:  # a run directory that was moved is not made again
        file.write(_to_json(values).encode())


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"


class Saver:
    """Asynchronous writer of the snapshots of one run.

    The next `save`, `check` or `wait` raises the error of its thread.
    """

    def __init__(self, run_dir: Path, keep_last: int, check_lock: Callable[[], None] = lambda: None) -> None:
        self.run_dir, self.keep_last, self.check_lock = run_dir, keep_last, check_lock
        self._executor = ThreadPoolExecutor(1, initializer=lower_thread_priority)
        self._writing: Future | None = None

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Start writing `snapshot`.

        `best` is the step of a checkpoint that is not pruned.
        """
        self.wait()
        self._writing = self._executor.submit(
            write_checkpoint, self.run_dir, snapshot, self.keep_last, best, self.check_lock
        )

    def check(self) -> Path | None:
        """Return the checkpoint completed since the last call, if any.

        Raises `StorageError` if it could not be written.
        """
        return self.wait() if self._writing and self._writing.done() else None

    def wait(self) -> Path | None:
        """Wait for the checkpoint being written, if any, and return it.

        Raises `StorageError` if it could not be written.
        """
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def close(self) -> None:
        """Wait until nothing is being written, without raising errors."""
        self._executor.shutdown(wait=True)


def lower_thread_priority() -> None:
    """Lower the priority of this thread below that of training."""
    if sys.platform == "linux":  # elsewhere the call applies to the full process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def find_best(run_dir: Path, evaluations: dict[int, dict]) -> int | None:
    """Return the saved step with the lowest validation loss.

    Returns the earliest of equal ones, and None if no saved step was evaluated.
    """
    steps = list_steps(run_dir)
    losses = {step: loss for step in steps for loss in select_loss(evaluations.get(step, {})).values()}
    return min(losses, key=losses.__getitem__, default=None)


def select_loss(metrics: dict) -> dict[str, float]:
    """Return the loss that selects the best checkpoint, by its name.

    The result is empty where it, or the generator's loss, was not finite or undefined.
    """
    name = next((name for name in BEST_BY if name in metrics), "")
    loss = metrics.get(name) if metrics.get("generator_loss", 0.0) is not None else None
    return {name: loss} if isinstance(loss, int | float) and math.isfinite(loss) else {}


def record_best(run_dir: Path, evaluations: dict[int, dict]) -> None:
    """Write `checkpoints/best.json`, or remove it when no saved step was evaluated."""
    path = run_dir / "checkpoints" / "best.json"
    step = find_best(run_dir, evaluations)
    if step is None:
        path.unlink(missing_ok=True)
    else:
        name = get_checkpoint_path(run_dir, step).name
        write_json(path, {"step": step, "checkpoint": name} | select_loss(evaluations[step]))
