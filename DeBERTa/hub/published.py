"""Loading of weights into a model, to start training from them.

Names of other code are converted (`names.py`). The file of a discriminator holds its word table as `weight`,
as a residual to the generator's (`_weight`, GDES), or both. A head or a position table that a file does not
have may start new; every other weight must be there, with the right shape.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
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
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that are loaded
OTHER_ROWS = (
    "--resize_vocab is for another vocabulary; for weights of a run give its config.json as --model_config"
)
ROWS_PER_CHUNK = 512  # of a table, so that temporary tensors stay small: 1.6 MB for base


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

    @property
    def target(self) -> str:
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
    set_tables(model, discriminator)
    return loaded | {"discriminator": copy_weights(model.discriminator, discriminator)}


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
    files = (generator, discriminator)
    layers = [count_layers(file.state) for file in files]
    wanted = [file.config.num_hidden_layers for file in files]
    has_rtd_head = [any(name.startswith("mask_predictions.") for name in file.state) for file in files]
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
            f"{file.target} is {wanted}; give a file of this model{hint}"
        )


@torch.no_grad()
def set_tables(model: RTDModel, file: WeightsFile) -> None:
    """Set the discriminator's word and position tables.

    The generator must have been loaded. What was set replaces the tables in the file.
    """
    embeddings = model.discriminator.deberta.embeddings
    for prefix, base in zip((WORD, POSITION), model.generator.get_tables(), strict=True):
        module = getattr(embeddings, prefix.rpartition(".")[2])
        if not isinstance(module, OwnTable | ResidualTable):
            continue  # ES: the generator's
        ((key, target),) = module.named_parameters()
        found = {name: file.state.pop(f"{prefix}.{name}", None) for name in ("weight", "_weight")}
        for name, tensor in found.items():
            if tensor is not None:
                check_tensor(f"{prefix}.{name}", tensor, target, file)
        table, residual = found.values()
        if table is None and residual is None:
            if prefix == WORD:
                raise_misfits(file.path, [f"{WORD}.weight is missing"], file.target)
            continue
        if isinstance(module, ResidualTable):
            set_residual(target, base, table, residual)
        elif table is not None:
            target.copy_(table)
        elif residual is not None:
            target.copy_(residual).add_(base)
        file.state[f"{prefix}.{key}"] = target.detach()


@torch.no_grad()
def set_residual(
    target: torch.Tensor, base: torch.Tensor, table: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """Set a residual such that `base + residual` is bitwise `table`, where one exists.

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
        chosen = difference = wanted - base_rows
        # The rounded difference may miss by one unit in the last place. Later candidates are preferred.
        candidates = [torch.nextafter(difference, torch.full((), end)) for end in (-torch.inf, torch.inf)]
        candidates += [difference] if residual is None else [difference, residual[rows].to(target.dtype)]
        for candidate in candidates:
            chosen = torch.where(base_rows + candidate == wanted, candidate, chosen)
        target[rows] = chosen


@torch.no_grad()
def copy_weights(model: nn.Module, file: WeightsFile) -> LoadedWeights:
    """Copy the file's tensors into the model.

    Raises `ConfigError` for weights that are missing, not part of the model, of another shape or not finite.
    """
    expected = model.state_dict()
    if file.role == "discriminator" and not file.config.position_biased_input:
        # Not read: it may be missing, and keeps its initial values.
        expected = {k: v for k, v in expected.items() if not k.startswith(POSITION) or k in file.state}
    used = [name for name in file.state if name in expected]
    ignored = [name for name in file.state if name not in expected]
    unknown = [f"{name} is not part of the model" for name in ignored if is_encoder_weight(name)]
    raise_misfits(file.path, unknown, file.target)
    new = find_new_parts([name for name in expected if name not in file.state], file)
    for name in used:
        check_tensor(name, file.state[name], expected[name], file)
    for name in used:
        expected[name].copy_(file.state[name])
    return LoadedWeights(str(file.path), len(used), new, tuple(ignored))


def is_encoder_weight(name: str) -> bool:
    """Return whether a name is a weight of an encoder, not of a head.

    Buffers and shared tables do not count.
    """
    is_table = name.startswith((f"{WORD}.", f"{POSITION}."))
    is_other = is_table or name.endswith(".position_ids") or ".pooler." in name
    return name.startswith("deberta.") and not is_other


def find_new_parts(missing: list[str], file: WeightsFile) -> tuple[str, ...]:
    """Return the parts of the model that start new, given names the file lacks.

    Raises `ConfigError` for a missing part that must not start new.
    """
    body = [f"{name} is missing" for name in missing if not name.startswith(tuple(HEADS))]
    raise_misfits(file.path, body, file.target)
    parts = [part for prefix, part in HEADS.items() if any(name.startswith(prefix) for name in missing)]
    if parts and not file.fresh_head:
        raise ConfigError(
            f"{file.path} has no {' and no '.join(parts)} ({missing[0]} is missing); give --fresh_head to "
            f"start {'it' if len(parts) == 1 else 'them'} new"
        )
    return tuple(parts)


def check_tensor(name: str, tensor: torch.Tensor, expected: torch.Tensor, file: WeightsFile) -> None:
    """Raise `ConfigError` for another shape, another kind, or values not finite."""
    problems = []
    if tensor.shape != expected.shape:
        hint = f" ({OTHER_ROWS})" if name == f"{WORD}.weight" else ""
        problems = [describe_shapes(name, tensor, expected) + hint]
    elif tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        problems = [
            f"{name} is not a dense tensor of 16, 32 or 64-bit floats ({tensor.dtype}, {tensor.layout})"
        ]
    raise_misfits(file.path, problems, file.target)
    check_finite(tensor, name, file.path)


def describe_shapes(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> str:
    """Return that a tensor has another shape."""
    return f"{name} has shape {list(tensor.shape)}, the model needs {list(expected.shape)}"


def raise_misfits(path: str | Path, problems: list[str], target: str) -> None:
    """Raise `ConfigError` with the first problem, if any, and the number of others."""
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(f"{path} does not fit {target}: {problems[0]}{more}; give a file of this model")


def select_weights(model: nn.Module, state: StateDict, path: str | Path) -> StateDict:
    """Return the tensors of a checkpoint, whose names and shapes must be the model's.

    Raises `ConfigError` for the first difference.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in expected]
    pairs = [(name, state[name], tensor) for name, tensor in expected.items() if name in state]
    problems += [describe_shapes(*pair) for pair in pairs if pair[1].shape != pair[2].shape]
    raise_misfits(path, problems, "its config.json")
    return state
