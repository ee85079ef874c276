"""Weights in the published layout: read `.bin` or `.safetensors` files and load them into our models.

Published files carry a little more or less than one model needs: a discriminator's file may hold the generator's head,
its word table whole (`weight`), as a GDES residual (`_weight`) or both, and no position table. All else must fit.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from DeBERTa.errors import ConfigError
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel

TABLES = ("word_embeddings", "position_embeddings")
HEADS = ("lm_predictions.", "mask_predictions.")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` (read with `weights_only=True`: nothing in it is executed) or `.safetensors` file.

    Raises `ConfigError` naming the file when it is missing or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        raise ConfigError(
            f"{path}: {_what_instead(path)}, not a weights file that can be read; fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ConfigError(f"{path}: expected a state dict of tensors")
    return state


def _what_instead(path: Path) -> str:
    """The usual wrong downloads."""
    beginning = path.read_bytes()[:64].lstrip()
    if beginning.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "a web page" if beginning.startswith(b"<") else "torn or foreign data"


def load_masked_lm(model: MaskedLanguageModel, path: str) -> None:
    """Load an MLM model or a generator. Raises `ConfigError` on missing, extra or misshapen weights."""
    load_strictly(model, read_weights(path), path)


def load_rtd(model: RTDModel, generator_path: str, discriminator_path: str) -> None:
    """Load generator and discriminator; under GDES and NES each starts exactly as published.

    GDES: the discriminator's table comes whole (`weight`) or as a residual (`_weight`); from a whole one the residual
    becomes `E_D - E_G`. Where a file holds both, the whole table counts. NES takes whole tables; under ES there is one
    table, the generator's, and the discriminator's is not used.
    """
    load_masked_lm(model.generator, generator_path)
    state = read_weights(discriminator_path)
    sharing = model.config.embedding_sharing
    generator = model.generator.tables()
    for name, base in zip(TABLES, generator, strict=True):
        key = f"deberta.embeddings.{name}"
        whole, residual = state.pop(f"{key}.weight", None), state.pop(f"{key}._weight", None)
        for tensor in (whole, residual):
            if tensor is not None and sharing != "nes" and tensor.shape != base.shape:
                raise ConfigError(
                    f"{discriminator_path}: {key} is {list(tensor.shape)}, the generator's table {list(base.shape)}; "
                    "the files do not belong to this --model_config"
                )
        if sharing == "gdes":
            if whole is not None:
                residual = whole - base.detach()
            elif residual is None:
                if name == "word_embeddings":
                    raise ConfigError(
                        f"{discriminator_path}: holds no word embeddings ({key}.weight or ._weight)"
                    )
                residual = torch.zeros_like(base)
            state[f"{key}._weight"] = residual
        elif sharing == "nes":
            if whole is None and residual is not None:
                whole = base.detach() + residual
            if whole is None and name == "position_embeddings":
                whole = model.discriminator.deberta.embeddings.position_embeddings.full().detach()
            if whole is not None:
                state[f"{key}.weight"] = whole
    load_strictly(model.discriminator, state, discriminator_path)


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Strict loading, apart from heads the model does not have and buffers older code saved."""
    model.load_state_dict(select_weights(model, state, path), strict=True)


def select_weights(
    model: nn.Module, state: dict[str, torch.Tensor], path: str | Path
) -> dict[str, torch.Tensor]:
    """What of `state` belongs to the model. Raises `ConfigError` for what is missing, foreign or of another shape."""
    expected = model.state_dict()
    foreign = tuple(head for head in HEADS if not any(name.startswith(head) for name in expected))
    state = {k: v for k, v in state.items() if not k.startswith(foreign) and not k.endswith("position_ids")}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the model needs {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more such" if len(problems) > 1 else ""
        raise ConfigError(f"{path} does not fit --model_config: {problems[0]}{more}")
    return state
