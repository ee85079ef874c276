"""Loading of published weights from `.bin` and `.safetensors` files.

The names in published files differ slightly from those of a model. The file of a discriminator may hold the
head of the generator. It holds the word embedding table as `weight`, as a residual `_weight` (GDES) or both,
but no position table. All other names must match.
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

StateDict = dict[str, torch.Tensor]


def load_masked_lm(model: MaskedLanguageModel, path: str | Path) -> None:
    """Load an MLM model or a generator.

    Raises `ConfigError` if the file cannot be read or does not match the model.
    """
    load_strictly(model, read_weights(path), path)


def load_rtd(model: RTDModel, generator_path: str | Path, discriminator_path: str | Path) -> None:
    """Load the published weights of generator and discriminator.

    With GDES and NES both models have their published weights, with ES they share the generator's tables.

    GDES: the residual is the `weight` of the discriminator's file minus the generator's table, or else the
    `_weight` of the file.
    NES: the table is the `weight` of the file, or else the generator's table plus the `_weight` of the file.
    ES: the only table is the generator's.

    Raises `ConfigError` if a file cannot be read or does not match the model.
    """
    load_masked_lm(model.generator, generator_path)
    state = read_weights(discriminator_path)
    generator, discriminator = model.generator.state_dict(), model.discriminator.state_dict()
    sharing = model.config.embedding_sharing
    for name in TABLES:
        key, residual_key = f"deberta.embeddings.{name}.weight", f"deberta.embeddings.{name}._weight"
        base, table, residual = generator[key], state.pop(key, None), state.pop(residual_key, None)
        for tensor in (residual,) if sharing == "nes" else (table, residual):
            if tensor is not None and tensor.shape != base.shape:
                raise ConfigError(
                    f"{discriminator_path} does not fit {generator_path}: {name} has shape "
                    f"{list(tensor.shape)}, the generator's {list(base.shape)}; give files of one model"
                )
        if sharing == "gdes":
            if table is not None:
                residual = table - base
            if residual is not None:
                state[residual_key] = residual
        elif sharing == "nes":
            if table is None and residual is not None:
                table = base + residual
            if table is not None:
                state[key] = table
    # No published discriminator has a position table of its own: a new one keeps its initial values.
    for key in (f"deberta.embeddings.{TABLES[1]}.weight", f"deberta.embeddings.{TABLES[1]}._weight"):
        if key in discriminator:
            state.setdefault(key, discriminator[key])
    load_strictly(model.discriminator, state, discriminator_path)


def read_weights(path: str | Path) -> StateDict:
    """Read the tensors of a `.bin` or `.safetensors` file.

    Code in the file is not executed. Raises `ConfigError` if the file is missing or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no weights file {path}: it does not exist; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        raise ConfigError(
            f"cannot read the weights in {path}: it is {_guess_content(path)}; fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"cannot read the weights in {path}: it is not a state dict of tensors; give one")
    return state


def _guess_content(path: Path) -> str:
    """Return a description of a file that does not hold weights."""
    beginning = path.read_bytes()[:64].lstrip()
    if beginning.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "a web page" if beginning.startswith(b"<") else "damaged or of another format"


def load_strictly(model: nn.Module, state: StateDict, path: str | Path) -> None:
    """Load a state dict whose names and shapes must match.

    Heads of other models are dropped. Raises `ConfigError` for any other difference.
    """
    model.load_state_dict(select_weights(model, state, path), strict=True)


def select_weights(model: nn.Module, state: StateDict, path: str | Path) -> StateDict:
    """Return the tensors that belong to the model.

    Heads of other models and buffers of older code are dropped. Raises `ConfigError` for weights that are
    missing, not part of the model, or of another shape.
    """
    expected = model.state_dict()
    foreign = tuple(head for head in HEADS if not any(name.startswith(head) for name in expected))
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(foreign) and not name.endswith("position_ids")
    }
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the model needs {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{path} does not fit --model_config: {problems[0]}{more}; give a file of this model"
        )
    return state
