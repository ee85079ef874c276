"""Checkpoints: what a run needs to go on, whole or not at all.

    checkpoints/step-00010000/model.safetensors   weights, residuals of shared tables included
                              optimizer.pt        moments, loss scaler, windows of losses, sums of the logging interval
                              state.json          step, seed, position in the data, versions, for people
                              config.json         settings, model, data and vocabulary fingerprints
                              manifest.json       size and SHA-256 of the files above

A checkpoint is written in a folder beside: files, then the manifest, each brought to the disk; then the folder gets its
name. Random numbers and batches are a function of (seed, step, rank), so that nothing of them has to be saved.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import ujson
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from DeBERTa.data.files import find_unused_path, hash_file, sync
from DeBERTa.errors import ConfigError, DamagedCheckpointError, StorageError
from DeBERTa.hub.published import read_weights, select_weights

FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.json")
MANIFEST = "manifest.json"
HASH_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Snapshot:
    """The run after `step` updates, in host memory of its own: training may go on while it is written."""

    step: int
    model: dict[str, torch.Tensor]
    training: dict
    state: dict
    settings: dict


def copy_to_host(value: object) -> object:
    """Tensors in nested dicts and lists, copied to host memory; all else as it is."""
    if isinstance(value, torch.Tensor):
        copied = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        return copied.copy_(value.detach())
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(item) for item in value)
    return value


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that were written to their end, oldest first."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def crash_point(name: str, step: int) -> None:
    """For tests: die here, as by a power cut, if the environment says DEBERTA_CRASH_AT=name@step."""
    if os.environ.get("DEBERTA_CRASH_AT") == f"{name}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def write_checkpoint(run_dir: Path, snapshot: Snapshot, keep_last: int, best: int | None) -> Path:
    """Write the checkpoint, then drop older ones but for the newest `keep_last` and step `best`.

    Raises `StorageError` when the disk is full or cannot be written; what was written so far is removed.
    """
    final = checkpoint_path(run_dir, snapshot.step)
    temporary = final.with_name(final.name + ".tmp")
    crash_point("before-save", snapshot.step)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        crash_point("folder-made", snapshot.step)
        _write_files(temporary, snapshot)
        if final.exists():  # left by a run that is no longer the one of this folder
            move_aside(final)
        temporary.rename(final)
        crash_point("renamed", snapshot.step)
        sync(final.parent)
        crash_point("rename-synced", snapshot.step)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(_why_not_saved(run_dir, snapshot, error)) from error
    prune(run_dir, snapshot.step, keep_last, best)
    crash_point("pruned", snapshot.step)
    return final


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    step = snapshot.step
    save_file(snapshot.model, folder / "model.safetensors")
    crash_point("model-written", step)
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save(snapshot.training, file)
    crash_point("optimizer-written", step)
    (folder / "state.json").write_text(_to_json(snapshot.state))
    crash_point("state-written", step)
    (folder / "config.json").write_text(_to_json(snapshot.settings))
    for name in FILES:
        sync(folder / name)
    crash_point("files-synced", step)
    write_manifest(folder, step)
    crash_point("manifest-written", step)
    sync(folder)
    crash_point("manifest-synced", step)


def write_manifest(folder: Path, step: int) -> None:
    """Record size and SHA-256 of the files in `folder`, by which `check` knows them again."""
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


def _why_not_saved(run_dir: Path, snapshot: Snapshot, error: Exception) -> str:
    """One sentence for a person."""
    steps = [step for step in saved_steps(run_dir) if step != snapshot.step]
    kept = f"; the same command goes on from step {steps[-1]}" if steps else ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({megabytes(shutil.disk_usage(run_dir).free)} free)"
    return (
        f"step {snapshot.step}: the checkpoint cannot be written to {run_dir / 'checkpoints'}: {reason}{free}; "
        f"make room there or move the folder and give its place as --output_dir{kept}"
    )


def megabytes(number: float) -> str:
    """Bytes for people: in MB (10^6)."""
    return f"{number / 1e6:,.1f} MB"


def prune(run_dir: Path, step: int, keep_last: int, best: int | None) -> None:
    """Remove checkpoints before `step`, but for the newest `keep_last` up to it and `best`."""
    for old in [saved for saved in saved_steps(run_dir) if saved <= step][:-keep_last]:
        if old != best:
            # The name goes first: a checkpoint half removed must not look like one.
            leaving = checkpoint_path(run_dir, old).with_suffix(".tmp")
            shutil.rmtree(leaving, ignore_errors=True)
            checkpoint_path(run_dir, old).rename(leaving)
            crash_point("old-renamed", step)
            shutil.rmtree(leaving, ignore_errors=True)


def check(folder: Path) -> None:
    """Raise `DamagedCheckpoint` naming the file that is missing or not as the manifest says."""
    try:
        manifest = ujson.loads((folder / MANIFEST).read_text())
        entries = {entry["name"]: (entry["size"], entry["sha256"]) for entry in manifest["files"]}
        missing = [name for name in FILES if name not in entries]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedCheckpointError(f"{folder / MANIFEST} cannot be read") from None
    if missing:
        raise DamagedCheckpointError(f"{folder / MANIFEST} does not list {missing[0]}")
    for name, (size, sha256) in entries.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found} bytes, {size} were written")
            if hash_file(path, HASH_CHUNK_BYTES) != sha256:
                raise DamagedCheckpointError(f"{path} is not as it was written (SHA-256 differs)")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from None


def find_newest_valid(run_dir: Path) -> tuple[int, list[DamagedCheckpointError]]:
    """Step of the newest checkpoint that is as it was written, 0 if there is none, and what is wrong with newer ones.

    Raises `ConfigError` when there are checkpoints, but none is whole.
    """
    damages = []
    for step in reversed(saved_steps(run_dir)):
        try:
            check(checkpoint_path(run_dir, step))
        except DamagedCheckpointError as damage:
            damages.append(damage)
        else:
            return step, damages
    if damages:
        raise ConfigError(
            f"none of the checkpoints in {run_dir / 'checkpoints'} can be used: {'; '.join(map(str, damages))}; "
            "put a whole one back, or give --fresh to start over (the old files are kept aside)"
        )
    return 0, damages


def move_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, out of the way of the run; returns its new name."""
    aside = find_unused_path(folder.with_name(f"damaged-{folder.name}"))
    folder.rename(aside)
    return aside


def read_model(run_dir: Path, step: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, by the model's names. Raises `ConfigError` for a torn file, or one of another model."""
    path = checkpoint_path(run_dir, step) / "model.safetensors"
    return select_weights(model, read_weights(path), path)


def read_training(run_dir: Path, step: int) -> dict:
    """What `Snapshot.training` held. Nothing in the file is executed."""
    path = checkpoint_path(run_dir, step) / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        raise DamagedCheckpointError(
            f"{path} cannot be read; remove {path.parent} to go on from the one before"
        ) from None


BEST_BY = ("discriminator_loss", "loss")  # the first that an evaluation has


def best_saved(run_dir: Path, evaluations: dict[int, dict]) -> int | None:
    """Of the checkpoints that are there, the step with the lowest validation loss; the earliest of equals."""
    losses = {
        step: validation_loss(evaluations[step])[1] for step in saved_steps(run_dir) if step in evaluations
    }
    return min((step for step, loss in losses.items() if loss is not None), key=losses.get, default=None)


def validation_loss(metrics: dict) -> tuple[str, float | None]:
    """What the best checkpoint is chosen by, and its name; None where it was not finite."""
    name = next(name for name in BEST_BY if name in metrics)
    return name, metrics[name]


def record_best(run_dir: Path, evaluations: dict[int, dict]) -> None:
    """Write `checkpoints/best.json`: which checkpoint is the best of those that are there."""
    path = run_dir / "checkpoints" / "best.json"
    step = best_saved(run_dir, evaluations)
    if step is None:
        path.unlink(missing_ok=True)
    else:
        name, loss = validation_loss(evaluations[step])
        write_json(path, {"step": step, "checkpoint": checkpoint_path(run_dir, step).name, name: loss})


def write_json(path: Path, values: dict) -> None:
    """Write aside and rename, indented for people. Raises `OSError` naming the file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(_to_json(values))
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def _to_json(values: dict) -> str:
    return ujson.dumps(values, indent=2, escape_forward_slashes=False) + "\n"
