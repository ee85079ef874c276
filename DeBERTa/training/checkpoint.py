"""What a run leaves on disk: checkpoints to go on from, and the final models.

    checkpoints/step-00010000/model.safetensors   weights, residuals of shared tables included
                              optimizer.pt        moments of every optimiser, and the loss scaler
                              state.json          step, versions
    model/ (MLM), or generator/ and discriminator/ (RTD):
                              model.safetensors   weights under the published names, tables whole
                              config.json         model config
                              spm.model           vocabulary

A checkpoint is written in a folder beside and renamed when complete. Random numbers need no saving: each step draws
from a generator seeded by (seed, step, rank).
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import ujson
from safetensors.torch import save_file
from torch import nn

from DeBERTa.config import ConfigError
from DeBERTa.hub.published import load_strictly, read_weights
from DeBERTa.model.pretraining import RTDModel
from DeBERTa.training.steps import TrainingStep


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, training: TrainingStep, keep_last: int) -> Path:
    """Save the state after `step` updates, then drop all but the newest `keep_last` checkpoints."""
    final = checkpoint_path(run_dir, step)
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    optimizers = {name: optimizer.state_dict() for name, optimizer in training.optimizers.items()}
    torch.save({"optimizers": optimizers, "scaler": training.scaler.state_dict()}, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(ujson.dumps({"step": step, "torch": torch.__version__}))
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(final.parent)
    for old in saved_steps(run_dir)[:-keep_last]:
        shutil.rmtree(checkpoint_path(run_dir, old))
    return final


def load_model(run_dir: Path, step: int, model: nn.Module) -> None:
    """Restore the weights in place. Raises `ConfigError` for a torn file, or one of another model."""
    path = checkpoint_path(run_dir, step) / "model.safetensors"
    load_strictly(model, read_weights(path), path)


def load_checkpoint(run_dir: Path, step: int, model: nn.Module, training: TrainingStep) -> None:
    """Restore weights, optimisers and scaler in place."""
    load_model(run_dir, step, model)
    path = checkpoint_path(run_dir, step) / "optimizer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        raise ConfigError(f"{path} cannot be read; remove {path.parent} to go on from the one before") from None
    for name, optimizer in training.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    training.scaler.load_state_dict(state["scaler"])


def save_models(run_dir: Path, model: nn.Module, vocabulary: Path) -> list[Path]:
    """Write the trained models for use elsewhere, each with its config and vocabulary; returns their folders."""
    if isinstance(model, RTDModel):
        parts = {
            "generator": (model.generator.state_dict(), model.config.generator),
            "discriminator": (model.standalone_discriminator(), model.config.discriminator),
        }
    else:
        parts = {"model": (model.state_dict(), model.config)}
    for name, (state, config) in parts.items():
        folder = run_dir / name
        folder.mkdir(exist_ok=True)
        weights = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(weights, folder / "model.safetensors.tmp")
        (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
        write_json(folder / "config.json", config.to_dict())
        shutil.copyfile(vocabulary, folder / "spm.model")
    return [run_dir / name for name in parts]


def write_json(path: Path, values: dict) -> None:
    """Write aside and rename, indented for people."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(ujson.dumps(values, indent=2, escape_forward_slashes=False) + "\n")
    temporary.replace(path)


FREE_TO_CHANGE = (
    "output_dir", "tag", "do_train", "do_eval", "workers", "eval_batch_size", "dump_interval", "keep_last",
    "log_interval", "data_dir", "vocab_path",
)  # fmt: skip


def check_same_run(saved: dict, current: dict, run_dir: Path) -> None:
    """Raise `ConfigError` naming the settings in which the run in `run_dir` differs from the one asked for."""
    differing = []
    for section in ("train", "model", "data"):
        old, new = _flat(saved.get(section, {})), _flat(current[section])
        for key in sorted((old.keys() | new.keys()) - set(FREE_TO_CHANGE)):
            if old.get(key) != new.get(key):
                differing.append(f"{key} ({old.get(key)} there, {new.get(key)} here)")
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {', '.join(differing)}; "
            "give another --tag or --output_dir, or the settings of that run to go on with it"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _sync(path: Path) -> None:
    """Have the file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
