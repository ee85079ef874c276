"""Export of trained models: directories of models, and published files.

A model directory, which transformers and this package read:
    config.json             model config with resolved sizes, and what transformers needs to know
    model.safetensors       weights under the published names, with full tables
    modeling_*.py           the head that transformers lacks, for `trust_remote_code=True`
    tokenizer.json, tokenizer_config.json, spm.model    vocabulary
    README.md, curves.svg   model card (`model_card.py`)
    model.onnx              the encoder, where requested (`onnx.py`)

It is written under a temporary name, synced to disk, and renamed.
"""

import contextlib
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from DeBERTa.config import ModelConfig
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.files import name_file, read_file, remove, sync
from DeBERTa.hub.model_card import draw_curves, format_card
from DeBERTa.hub.onnx import write_encoder
from DeBERTa.hub.tokenizer_json import build_tokenizer_config, build_tokenizer_json
from DeBERTa.hub.weights import StateDict, write_tensors
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.report.read import RunRecord

MODELING = Path(__file__).parent / "modeling"
OPTIONAL_FILES = {"curves.svg", "model.onnx", "model.onnx.data"}


class ExportedModel(NamedTuple):
    """One model of a run: config, weights, and class of its head for transformers."""

    name: str
    config: ModelConfig
    weights: StateDict
    auto_class: str
    head_class: str


def list_models(model: MaskedLanguageModel | RTDModel) -> list[ExportedModel]:
    """Return the model of an MLM run, or generator and discriminator of an RTD run."""
    masked_lm = ("AutoModelForMaskedLM", "modeling_masked_lm.DebertaForMaskedLM")
    replaced = ("AutoModelForPreTraining", "modeling_replaced_tokens.DebertaForReplacedTokenDetection")
    if isinstance(model, MaskedLanguageModel):
        return [ExportedModel("model", model.config, model.state_dict(), *masked_lm)]
    config = model.config
    return [
        ExportedModel("generator", config.generator, model.generator.state_dict(), *masked_lm),
        ExportedModel("discriminator", config.discriminator, model.merge_discriminator(), *replaced),
    ]


def build_config(model: ExportedModel) -> dict[str, Any]:
    """Return the content of `config.json`.

    All sizes are resolved: transformers takes a size of 0 literally. It scales scores by the number of terms
    in `pos_att_type`, also where `relative_attention` is false.
    """
    config = model.config
    return config.to_dict() | {
        "pos_att_type": config.pos_att_type if config.position_terms else "none",
        "attention_head_size": config.head_size,
        "embedding_size": config.embedding_width,
        "max_relative_positions": config.max_distance,
        "model_type": "deberta-v2",
        "architectures": [model.head_class.partition(".")[2]],
        "auto_map": {model.auto_class: model.head_class},
        "legacy": False,  # the names of the LM head are the published ones
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }


def write_model(
    model: ExportedModel, directory: Path, tokenizer: Tokenizer, run: RunRecord | None, has_onnx: bool = False
) -> None:
    """Write a model directory, with a card that describes its run.

    has_onnx: write the encoder as `model.onnx`, too.

    Raises `ConfigError` or `VocabularyError` where transformers has no such model or vocabulary, and
    `OSError` when the directory cannot be written.
    """
    if problem := model.config.describe_unusual_heads() or _describe_clamped_distances(model.config):
        raise ConfigError(f"cannot export to transformers, which has no such model: {problem}")
    config, max_length = build_config(model), model.config.max_position_embeddings
    tokenizer_json, modeling = build_tokenizer_json(tokenizer), f"{model.head_class.partition('.')[0]}.py"
    texts = {
        "config.json": _to_json(config),
        "tokenizer.json": json.dumps(tokenizer_json, ensure_ascii=False),
        "tokenizer_config.json": _to_json(build_tokenizer_config(max_length)),
        modeling: (MODELING / modeling).read_text(),
        "README.md": format_card(model.name, config, run),
    }
    if run:
        texts["curves.svg"] = draw_curves(run)
    with replace_directory(directory) as temporary:
        _write_files(temporary, {"model.safetensors": model.weights}, tokenizer.path, texts)
        if has_onnx:
            write_encoder(model.weights, model.config, temporary / "model.onnx")


def _describe_clamped_distances(config: ModelConfig) -> str:
    """Return which distances transformers does not clamp: those with buckets, or ""."""
    length = config.max_position_embeddings
    if not config.position_terms or config.position_buckets <= 0 or config.max_distance >= length:
        return ""
    what = f"position_buckets with max_relative_positions {config.max_distance} below"
    return f"{what} max_position_embeddings {length}; omit max_relative_positions"


def write_plain_model(model: ExportedModel, directory: Path, vocabulary: Path) -> None:
    """Write a model that transformers does not have, for this package.

    Written are weights, config and vocabulary.
    """
    texts = {"config.json": _to_json(model.config.to_dict())}
    with replace_directory(directory) as temporary:
        _write_files(temporary, {"model.safetensors": model.weights}, vocabulary, texts)


def write_published(model: MaskedLanguageModel | RTDModel, directory: Path, vocabulary: Path) -> None:
    """Write the files that the published code reads.

    `pytorch_model.bin` and, for RTD, `pytorch_model.generator.bin`. A discriminator that adds residuals to
    the generator's tables (GDES) has both `weight`, the sum, and `_weight`, the residual.
    """
    models = {"pytorch_model.bin": model.state_dict()}
    if isinstance(model, RTDModel):
        models = {
            "pytorch_model.generator.bin": model.generator.state_dict(),
            "pytorch_model.bin": model.merge_discriminator() | model.discriminator.state_dict(),
        }
    texts = {"model_config.json": _to_json(model.config.to_dict())}
    with replace_directory(directory) as temporary:
        _write_files(temporary, models, vocabulary, texts)


def _write_files(folder: Path, models: dict[str, StateDict], vocabulary: Path, texts: dict[str, str]) -> None:
    """Write weights, in the format that their file name says, vocabulary and texts."""
    for name, weights in models.items():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save: Callable[[StateDict, Path], None] = torch.save if name.endswith(".bin") else write_tensors
        with name_file(folder / name) as path:
            save(tensors, path)
    contents = {name: text.encode() for name, text in texts.items()} | {"spm.model": read_file(vocabulary)}
    for name, content in contents.items():
        with name_file(folder / name) as path:
            path.write_bytes(content)


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory that replaces `path` when the block succeeds.

    At any moment `path` is missing or complete. It may exist as a directory of the files that are written
    now; other files there are not removed: `OSError` is raised. After a SIGKILL between the two renames,
    `path` is missing, and its previous content is in `.NAME.old-export`. The next call restores it first.
    The parent directory is not created: it may be that of a run, which was moved.
    """
    path = path.resolve()  # a link stays; what it points to is replaced
    temporary, previous = (path.with_name(f".{path.name}.{kind}-export") for kind in ("tmp", "old"))
    if previous.exists() and not path.exists():
        previous.rename(path)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        known = {file.name for file in temporary.iterdir()} | OPTIONAL_FILES
        others = sorted({file.name for file in path.iterdir()} - known) if path.exists() else []
        if others:
            reason = f"other files are there ({', '.join(others[:3])})"
            raise FileExistsError(errno.EEXIST, reason, str(path))
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        remove(previous)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)
    remove(previous)
