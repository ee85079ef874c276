"""Model config of a run: its file, and the size of its vocabulary."""

import difflib
from pathlib import Path
from typing import Any

from DeBERTa.config import ModelConfig, RTDConfig, TrainConfig, find_experiments, read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.training.distributed import broadcast_value, is_rank_zero

SPARE_ROWS = 127  # rows of a word embedding table beyond the tokens (128100 rows for 128001)
ROW_MULTIPLE = 64  # of a table that follows from the vocabulary: fast matmuls


def load_model_config(config: TrainConfig, tokenizer: Tokenizer) -> tuple[ModelConfig | RTDConfig, list[str]]:
    """Read the model config and resolve its vocabulary size.

    Returns it with notes on what may be unexpected. Raises `ConfigError` if it is invalid, or does not match
    the vocabulary or `--max_seq_length`. Collective: every rank calls it.
    """
    path = find_model_config(config.model_config)
    values = read_json(path)
    if "train" in values and isinstance(values.get("model"), dict):  # the config.json of a run
        values = values["model"]
    kind = RTDConfig if config.task_name == "RTD" else ModelConfig
    if config.vocab_size:
        _set_vocab_size(values, config.vocab_size)
    rows = kind.from_dict(values, str(path)).models[0].vocab_size
    rows, note = resolve_vocab_size(config, rows, tokenizer, path)
    _set_vocab_size(values, rows)
    model_config = kind.from_dict(values, str(path))
    positions = min(model.max_position_embeddings for model in model_config.models)
    if config.max_seq_length > positions:
        raise ConfigError(
            f"--max_seq_length {config.max_seq_length} exceeds max_position_embeddings {positions} of {path}"
        )
    notes = {model.describe_unusual_heads() for model in model_config.models} | {note}
    return model_config, sorted(notes - {""})


def find_model_config(name: str) -> Path:
    """Return the path of a model config: the file of this name, or the shipped one.

    Raises `ConfigError` with both places if there is none.
    """
    folder = find_experiments() / "language_model"
    places = [Path(name), folder / name]
    for path in places:
        if path.exists():
            return path
    closest = difflib.get_close_matches(places[0].name, [file.name for file in folder.glob("*.json")])
    hint = f"the closest names there are {', '.join(closest)}" if closest else "check the name"
    raise ConfigError(f"--model_config {name}: neither {places[0].absolute()} nor {places[1]} exists; {hint}")


def resolve_vocab_size(config: TrainConfig, rows: int, tokenizer: Tokenizer, path: Path) -> tuple[int, str]:
    """Return the number of rows of the word table, and a note if it is not usual.

    It is `rows`, that of the model config or `--vocab_size`, where the vocabulary fits. Otherwise it follows
    from the vocabulary, unless it is given or weights are loaded as they are (without `--resize_vocab`).
    """
    tokens = len(tokenizer)
    fitting = -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    has_weights = bool(config.init_model or config.init_generator)
    trained_rows = None if config.do_train or has_weights else find_trained_rows(config)
    rows = trained_rows or rows
    if tokens <= rows <= tokens + SPARE_ROWS:
        return rows, ""
    has_fixed_rows = has_weights and not config.resize_vocab
    if not (config.vocab_size or has_fixed_rows or trained_rows):
        return fitting, f"the word table has {fitting} rows for {tokens} tokens, not the {rows} of {path}"
    if rows >= tokens:
        return rows, f"{rows - tokens} of the {rows} rows of the word table belong to no token"
    source = f"--vocab_size {rows}" if config.vocab_size else f"vocab_size {rows} of {path}"
    advice = "give the --vocab_path of the weights, or the config.json of their run as --model_config"
    if config.vocab_size:
        advice = f"give --vocab_size {fitting}"
    raise ConfigError(f"{source} is too small for the {tokens} tokens of {tokenizer.path}: {advice}")


def find_trained_rows(config: TrainConfig) -> int | None:
    """Return the vocabulary size of the run to evaluate, or None without a run.

    Rank 0 reads it. Raises `ConfigError` if that config is damaged. Collective: every rank calls it.
    """
    rows, path = None, config.run_dir / "config.json"
    if is_rank_zero() and path.is_file():
        model = read_json(path).get("model")
        if isinstance(model, dict):
            kind = RTDConfig if "generator" in model else ModelConfig
            rows = kind.from_dict(model, str(path)).models[0].vocab_size
    return broadcast_value(rows)


def _set_vocab_size(values: dict[str, Any], rows: int) -> None:
    """Set the vocabulary size of a model config, or of both models of an RTD config."""
    models = [values[name] for name in ("generator", "discriminator") if isinstance(values.get(name), dict)]
    for model in models or [values]:
        model["vocab_size"] = rows
