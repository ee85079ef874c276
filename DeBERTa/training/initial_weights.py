"""Where a run starts from: the weights of `--init_*`, and what was loaded.

A reference is a file, the directory of a model or a run, or `hf:OWNER/NAME[@REVISION]`.
"""

import logging
from contextlib import suppress
from pathlib import Path

from DeBERTa.config import ModelConfig, TrainConfig, convert_hub_config, read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.download import HUB, fetch_from_hub
from DeBERTa.errors import ConfigError, DownloadError
from DeBERTa.hub.published import FROM_DISCRIMINATOR, LoadedWeights, LoadOptions, load_masked_lm, load_rtd
from DeBERTa.hub.vocabulary import VocabularyMap
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.training.checkpoint import find_newest_valid, get_checkpoint_path
from DeBERTa.training.run_dir import format_value

logger = logging.getLogger(__name__)

GENERATOR_FILE = "pytorch_model.generator.bin"
VOCABULARY_FILE, CONFIG_FILE = "spm.model", "config.json"
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
# Settings that shapes of weights show: where a config.json omits them, they are those of --model_config.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "attention_head_size",
)  # fmt: skip


def load_initial_weights(
    config: TrainConfig, model: MaskedLanguageModel | RTDModel, tokenizer: Tokenizer
) -> dict[str, LoadedWeights]:
    """Load the weights of `--init_*`, if any; return what was loaded by model.

    Raises `ConfigError` if they cannot be found or read, or do not match the model.
    """
    generator = model if isinstance(model, MaskedLanguageModel) else model.generator
    resize, vocabulary = None, tokenizer
    if config.resize_vocab:
        vocabulary = Tokenizer(find_vocabulary(config.resize_vocab))
        rows = VocabularyMap(vocabulary, tokenizer, generator.config.vocab_size)
        logger.info("--resize_vocab: %d of %d pieces keep their rows", rows.num_shared, len(tokenizer))
        resize = rows.convert
    options = LoadOptions(config.fresh_head, resize)
    if isinstance(model, MaskedLanguageModel) and config.init_model:
        path = find_weights(config.init_model, "model", model.config)
        check_vocabulary(path, vocabulary)
        return {"model": load_masked_lm(model, path, options)}
    if isinstance(model, RTDModel) and config.init_generator:
        source: str | Path = config.init_generator
        if source != FROM_DISCRIMINATOR:
            source = find_weights(config.init_generator, "generator", generator.config)
            check_vocabulary(source, vocabulary)
        path = find_weights(config.init_discriminator, "discriminator", model.config.discriminator)
        check_vocabulary(path, vocabulary)
        return load_rtd(model, source, path, options)
    return {}


def find_vocabulary(reference: str) -> Path:
    """Return the vocabulary that `--resize_vocab` names, fetched if needed."""
    if reference.startswith(HUB):
        return fetch_from_hub(reference, (VOCABULARY_FILE,), "give a file")
    path = Path(reference)
    if path.is_dir():
        folders = (path, path / "model", path / "discriminator")
        path = next((f / VOCABULARY_FILE for f in folders if (f / VOCABULARY_FILE).is_file()), path)
    return path


def find_weights(reference: str, role: str, config: ModelConfig) -> Path:
    """Return the file that a flag names, fetched if needed.

    Args:
        reference: a file, a directory or `hf:OWNER/NAME[@REVISION]`.
        role: "model", "generator" or "discriminator".
        config: the model to load it into. Raises `ConfigError` if the `config.json` next to it differs
            in a setting that no shape would reveal.
    """
    if not reference.startswith(HUB):
        path = find_in_directory(Path(reference), role) if Path(reference).is_dir() else Path(reference)
    else:
        path = fetch_weights(reference, role)
    if path.name != GENERATOR_FILE:  # the config.json next to that is the discriminator's
        check_silent_settings(path, role, config)
    return path


def fetch_weights(reference: str, role: str) -> Path:
    """Fetch the weights of a model on the hub, and what is compared with them.

    Next to a discriminator, a generator has a file name of its own. In a repository without that, it is
    taken if the config names a model with an LM head, as that of an exported generator does.
    """
    names: tuple[str, ...] = MODEL_FILES
    hint = "give a file"
    if role == "generator":
        names = (GENERATOR_FILE,)
        hint = f"give --init_generator {FROM_DISCRIMINATOR}, or the file of a generator"
        with suppress(DownloadError):
            config = read_json(fetch_from_hub(reference, (CONFIG_FILE,), hint))
            names += MODEL_FILES if "MaskedLM" in str(config.get("architectures")) else ()
    path = fetch_from_hub(reference, names, hint)
    if path.name != GENERATOR_FILE:
        for name in (CONFIG_FILE, VOCABULARY_FILE):
            with suppress(DownloadError):  # it is compared if there is one
                fetch_from_hub(reference, (name,), hint)
    return path


def check_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` if the vocabulary next to a file has other pieces.

    They are compared with those of `tokenizer`.
    """
    own = path.with_name(VOCABULARY_FILE)
    if own.is_file() and Tokenizer(own).pieces != tokenizer.pieces:
        raise ConfigError(
            f"{path} is of another vocabulary than {tokenizer.path}: it is that of {own}; give it as "
            "--vocab_path with text prepared with it, or as --resize_vocab"
        )


def find_in_directory(directory: Path, role: str) -> Path:
    """Return the weights in the directory of a model or of a run.

    Of a run, they are the final ones, or those of the newest valid checkpoint. Raises `ConfigError` if there
    are none.
    """
    names = (GENERATOR_FILE, *MODEL_FILES) if role == "generator" else MODEL_FILES
    for folder in (directory / role, directory / "model", directory):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    if role == "model" and (directory / "discriminator").is_dir():
        raise ConfigError(
            f"{directory} holds a generator and a discriminator: --init_model takes one; give "
            f"{directory / 'generator'} or {directory / 'discriminator'}"
        )
    step, _ = find_newest_valid(directory)
    if not step:
        raise ConfigError(
            f"{directory} holds no weights: neither {' nor '.join(names)} nor checkpoints; "
            "give the directory of a model or of a run"
        )
    return get_checkpoint_path(directory, step) / "model.safetensors"


def check_silent_settings(path: Path, role: str, config: ModelConfig) -> None:
    """Raise `ConfigError` for other settings of a kind that shapes do not show.

    They are compared with the `config.json` next to the file, in which a missing setting has its default.
    """
    config_path = path.with_name(CONFIG_FILE)
    values = read_json(config_path) if config_path.is_file() else {}
    if isinstance(models := values.get("model"), dict):  # of a run, with one model or two
        values = models.get(role, models)
    fields = config.to_dict()
    known = {k: v for k, v in convert_hub_config(values, str(config_path)).items() if k in fields}
    if not known:
        return
    sizes = {name: fields[name] for name in SIZES}
    there = describe_computation(ModelConfig.from_dict(sizes | known, str(config_path)))
    differing = [
        f"{name} ({format_value(there.get(name))} there, {format_value(value)} here)"
        for name, value in describe_computation(config).items()
        if there.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"{config_path} differs from --model_config in {', '.join(differing)}; "
            "give the config of these weights"
        )


def describe_computation(config: ModelConfig) -> dict[str, object]:
    """Return the settings that no shape of a weight shows.

    They change what a model computes.
    """
    described: dict[str, object] = {
        "num_attention_heads": config.num_attention_heads,
        "position_biased_input": config.position_biased_input,
        "pos_att_type": "|".join(config.position_terms) or "none",
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "conv_act": config.conv_act if config.conv_kernel_size else "none",
    }
    if config.position_terms:
        described["share_att_key"] = config.share_att_key
        described["norm_rel_ebd"] = config.norm_rel_ebd
        described["position_buckets"] = max(config.position_buckets, 0)
        described["max_relative_positions"] = config.max_distance
    return described
