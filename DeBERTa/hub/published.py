"""Loading of weights into a model, to start training from them.

Names of other code are converted (`names.py`). The file of a discriminator holds its word table as `weight`,
as a residual to the generator's (`_weight`, GDES), or both. A head or a position table that a file does not
have may start new; every other weight must be there, with the right shape.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from DeBERTa.config import ModelConfig
from DeBERTa.errors import ConfigError
from DeBERTa.hub.names import LM_HEAD, POSITION, WORD, convert_names, count_layers
from DeBERTa.hub.weights import StateDict, check_finite, read_weights
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.model.sharing import OwnTable, ResidualTable

FROM_DISCRIMINATOR = "from-discriminator"  # in place of a generator's file
HEADS = {LM_HEAD: "LM head", "mask_predictions.": "RTD head", f"{POSITION}.": "position table"}
ROWS_PER_CHUNK = 4096  # of a table, so that temporary tensors stay small


@dataclass(frozen=True)
class LoadedWeights:
    """What a model received from a file.

    Attributes:
        path: the file.
        loaded: number of tensors that were used.
        new: parts of the model that the file does not have, which start new.
        ignored: names in the file that the model has no use for.
    """

    path: str
    loaded: int
    new: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line for the banner."""
        groups = sorted({".".join(name.split(".")[:2]) for name in self.ignored})
        new = f"; new: {', '.join(self.new)}" if self.new else ""
        ignored = f"; ignored: {', '.join(groups)}" if groups else ""
        return f"{self.loaded} tensors of {self.path}{new}{ignored}"


@dataclass
class WeightsFile:
    """Tensors of a file under the names of a model, and the options to load them with.

    Attributes:
        role: "model", "generator" or "discriminator".
        fresh_head: whether a missing head or position table may start new.
    """

    path: Path
    role: str
    config: ModelConfig
    state: StateDict
    fresh_head: bool

    def describe_model(self) -> str:
        """Return what the file is loaded into, for messages."""
        return "--model_config" if self.role == "model" else f"the {self.role} of --model_config"


@dataclass(frozen=True)
class LoadOptions:
    """How files are read.

    Attributes:
        fresh_head: whether a missing head or position table may start new.
        resize: converts the tensors to another vocabulary.
    """

    fresh_head: bool = False
    resize: Callable[[StateDict, str | Path], StateDict] | None = None


def open_weights(path: str | Path, role: str, config: ModelConfig, options: LoadOptions) -> WeightsFile:
    """Read a file under the names of a model.

    Raises `ConfigError` if it cannot be read.
    """
    state = convert_names(read_weights(path), config.num_attention_heads, role, path)
    if options.resize:
        state = options.resize(state, path)
    return WeightsFile(Path(path), role, config, state, options.fresh_head)


def load_masked_lm(
    model: MaskedLanguageModel, path: str | Path, options: LoadOptions | None = None
) -> LoadedWeights:
    """Load an MLM model.

    Raises `ConfigError` if the file cannot be read or does not match the model.
    """
    file = open_weights(path, "model", model.config, options or LoadOptions())
    check_layers(file)
    return copy_weights(model, file)


def load_rtd(
    model: RTDModel,
    generator_path: str | Path,
    discriminator_path: str | Path,
    options: LoadOptions | None = None,
) -> dict[str, LoadedWeights]:
    """Load generator and discriminator.

    With GDES and NES the discriminator computes what the model in its file computes, with ES it has the
    generator's tables. `generator_path` may be "from-discriminator": the generator then starts with the
    discriminator's tables and its first layers.

    Raises `ConfigError` if a file cannot be read or does not match the model.
    """
    config, options = model.config, options or LoadOptions()
    discriminator = open_weights(discriminator_path, "discriminator", config.discriminator, options)
    if str(generator_path) == FROM_DISCRIMINATOR:
        generator = select_first_layers(discriminator, config.generator)
    else:
        generator = open_weights(generator_path, "generator", config.generator, options)
        check_order(generator, discriminator)
    check_layers(generator)
    loaded = {"generator": copy_weights(model.generator, generator)}
    check_layers(discriminator)
    done, num_tables = load_tables(model, discriminator)
    rest = copy_weights(model.discriminator, discriminator, skipped=done)
    return loaded | {"discriminator": replace(rest, loaded=rest.loaded + num_tables)}


def select_first_layers(discriminator: WeightsFile, config: ModelConfig) -> WeightsFile:
    """Return the discriminator's file as that of a generator with fewer layers.

    Its LM head and position table are used as far as the file has them. Raises `ConfigError` if the file has
    residuals in place of a word table.
    """
    if f"{WORD}.weight" not in discriminator.state:
        raise ConfigError(
            f"{discriminator.path} has no {WORD}.weight: --init_generator {FROM_DISCRIMINATOR} needs the "
            "full table; give the file of its generator"
        )
    state = {}
    for name, tensor in discriminator.state.items():
        layer = re.match(r"deberta\.encoder\.layer\.(\d+)\.", name)
        if not (layer and int(layer[1]) >= config.num_hidden_layers) and not name.endswith("._weight"):
            state[name] = tensor
    return WeightsFile(discriminator.path, "generator", config, state, fresh_head=True)


def check_order(generator: WeightsFile, discriminator: WeightsFile) -> None:
    """Raise `ConfigError` if each file is that of the other model."""
    layers = [count_layers(file.state) for file in (generator, discriminator)]
    wanted = [file.config.num_hidden_layers for file in (generator, discriminator)]
    has_rtd_head = [
        any(name.startswith("mask_predictions.") for name in file.state)
        for file in (generator, discriminator)
    ]
    if (layers != wanted and layers == wanted[::-1]) or has_rtd_head == [True, False]:
        raise ConfigError(
            f"the files are swapped: {generator.path} holds the discriminator and {discriminator.path} the "
            "generator; exchange --init_generator and --init_discriminator"
        )


def check_layers(file: WeightsFile) -> None:
    """Raise `ConfigError` if the file has more or fewer layers than the model."""
    layers, wanted = count_layers(file.state), file.config.num_hidden_layers
    if layers != wanted:
        hint = f", or --init_generator {FROM_DISCRIMINATOR}" if file.role == "generator" else ""
        raise ConfigError(
            f"{file.path} does not fit: its num_hidden_layers is {layers}, but that of "
            f"{file.describe_model()} is {wanted}; give a file of this model{hint}"
        )


def load_tables(model: RTDModel, file: WeightsFile) -> tuple[list[str], int]:
    """Load the discriminator's word and position tables.

    The generator must have been loaded. A position table that neither the file has nor the model reads keeps
    its initial values. Returns the names in the model that need no further loading, and how many of them the
    file has.
    """
    embeddings = model.discriminator.deberta.embeddings
    done, loaded = [], 0
    for prefix, base in zip((WORD, POSITION), model.generator.get_tables(), strict=True):
        module = getattr(embeddings, prefix.rpartition(".")[2])
        if not isinstance(module, OwnTable | ResidualTable):
            continue  # ES: the generator's
        (target,) = module.parameters()
        table, residual = (file.state.pop(f"{prefix}.{key}", None) for key in ("weight", "_weight"))
        for name, tensor in ((f"{prefix}.weight", table), (f"{prefix}._weight", residual)):
            if tensor is not None:
                check_tensor(name, tensor, target, file)
        has_table = table is not None or residual is not None
        if not has_table and prefix == WORD:
            raise_misfit(file, [f"{WORD}.weight is missing"])
        if isinstance(module, ResidualTable):
            set_residual(target, base, table, residual)
        else:
            set_table(target, base, table, residual)
        loaded += has_table
        if has_table or not file.config.position_biased_input:
            done.append(f"{prefix}.{'weight' if isinstance(module, OwnTable) else '_weight'}")
    return done, loaded


@torch.no_grad()
def set_table(
    target: torch.Tensor, base: torch.Tensor, table: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """Set a table of its own: `table`, or else the generator's plus `residual`."""
    if table is not None:
        target.copy_(table)
    elif residual is not None:
        target.copy_(residual).add_(base)


@torch.no_grad()
def set_residual(
    target: torch.Tensor, base: torch.Tensor, table: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """Set a residual such that `base + residual` is bitwise `table`, where such a residual exists.

    It exists for every table that was computed as such a sum. The file's residual is used where it gives this
    sum, and without a table.
    """
    if table is None:
        if residual is not None:
            target.copy_(residual)
        return
    for first in range(0, len(target), ROWS_PER_CHUNK):
        rows = slice(first, first + ROWS_PER_CHUNK)
        wanted, base_rows = table[rows].to(target.dtype), base[rows]
        difference = wanted - base_rows
        neighbors = [torch.nextafter(difference, torch.full((), end)) for end in (torch.inf, -torch.inf)]
        if residual is not None:
            own = residual[rows].to(target.dtype)
            difference = torch.where(base_rows + own == wanted, own, difference)
        # The rounded difference may miss by one unit in the last place.
        for candidate in neighbors:
            is_missed = base_rows + difference != wanted
            if not is_missed.any():
                break
            difference = torch.where(is_missed & (base_rows + candidate == wanted), candidate, difference)
        target[rows] = difference


@torch.no_grad()
def copy_weights(model: nn.Module, file: WeightsFile, skipped: Iterable[str] = ()) -> LoadedWeights:
    """Copy the file's tensors into the model, except to the names in `skipped`.

    Raises `ConfigError` for weights that are missing, not part of the model, of another shape or not finite.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in set(skipped)}
    used = [name for name in file.state if name in expected]
    ignored = [name for name in file.state if name not in expected]
    unknown = [name for name in ignored if is_encoder_weight(name)]
    if unknown:
        raise_misfit(file, [f"{name} is not part of the model" for name in unknown])
    missing = [name for name in expected if name not in file.state]
    new = find_new_parts(missing, file)
    for name in used:
        check_tensor(name, file.state[name], expected[name], file)
    for name in used:
        expected[name].copy_(file.state[name])
    return LoadedWeights(str(file.path), len(used), new, tuple(ignored))


def is_encoder_weight(name: str) -> bool:
    """Return whether a name is a weight of an encoder, not of a head, and not a buffer or shared table."""
    is_table = name.startswith((f"{WORD}.", f"{POSITION}."))
    is_other = is_table or name.endswith(".position_ids") or ".pooler." in name
    return name.startswith("deberta.") and not is_other


def find_new_parts(missing: list[str], file: WeightsFile) -> tuple[str, ...]:
    """Return the parts of the model that start new, given the names that the file does not have.

    Raises `ConfigError` for a missing part that must not start new.
    """
    body = [name for name in missing if not name.startswith(tuple(HEADS))]
    if body:
        raise_misfit(file, [f"{name} is missing" for name in body])
    parts = [part for prefix, part in HEADS.items() if any(name.startswith(prefix) for name in missing)]
    if parts and not file.fresh_head:
        raise ConfigError(
            f"{file.path} has no {' and no '.join(parts)} ({missing[0]} is missing); give --fresh_head to "
            f"start {'it' if len(parts) == 1 else 'them'} new"
        )
    return tuple(parts)


def check_tensor(name: str, tensor: torch.Tensor, expected: torch.Tensor, file: WeightsFile) -> None:
    """Raise `ConfigError` for a tensor of another shape, of another kind, or with values not finite."""
    if tensor.shape != expected.shape:
        hint = " (--resize_vocab is for another vocabulary)" if name == f"{WORD}.weight" else ""
        raise_misfit(
            file, [f"{name} has shape {list(tensor.shape)}, the model needs {list(expected.shape)}{hint}"]
        )
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise_misfit(file, [f"{name} is not a dense tensor of real values ({tensor.dtype}, {tensor.layout})"])
    check_finite(tensor, name, file.path)


def raise_misfit(file: WeightsFile, problems: list[str]) -> None:
    """Raise `ConfigError` with the first problem and the number of the others."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    raise ConfigError(
        f"{file.path} does not fit {file.describe_model()}: {problems[0]}{more}; give a file of this model"
    )


def select_weights(model: nn.Module, state: StateDict, path: str | Path) -> StateDict:
    """Return the tensors of a checkpoint, whose names and shapes must be the model's.

    Raises `ConfigError` for the first difference.
    """
    expected = model.state_dict()
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
