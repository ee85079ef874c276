"""The published recipes: task, model config, text and flags by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from DeBERTa.config import TrainConfig
from DeBERTa.errors import UsageError
from DeBERTa.files import get_cache_dir, hash_file

# Texts that presets train on: the path of the vocabulary in the cache directory, and the number of pieces of
# a vocabulary that is trained on the text, or 0 for the published one.
CORPORA = {"sample": ("sample/spm.model", 8000), "wikitext-103": ("deberta-v3-base/spm.model", 0)}


@dataclass(frozen=True)
class Preset:
    """One recipe, selected by `--preset`.

    Attributes:
        flags: values of `TrainConfig` fields that differ from the defaults.
        is_continued: whether training starts from the published weights of the same name.
        has_generator: whether these weights include a generator.
    """

    task_name: str
    model_config: str
    flags: Mapping[str, Any]
    corpus: str = "wikitext-103"
    max_seq_length: int = 512
    is_continued: bool = False
    has_generator: bool = True


# The published scripts share these; other values than the flags' defaults are named below.
FULL = {"num_training_steps": 1_000_000, "dump_interval": 10_000, "warmup": 10_000.0, "learning_rate": 1e-4}
FULL_MLM = FULL | {"train_batch_size": 256, "max_ngram": 3}
FULL_RTD = FULL | {"train_batch_size": 256}
LARGE_MLM = FULL_MLM | {"train_batch_size": 32, "warmup": 1000.0}
XSMALL_RTD = FULL | {"train_batch_size": 64, "learning_rate": 3e-4}
CONTINUE = FULL_RTD | {"num_training_steps": 100_000, "learning_rate": 5e-5}
TINY = {
    "num_training_steps": 400, "dump_interval": 200, "log_interval": 20, "warmup": 40.0,
    "learning_rate": 2e-3, "train_batch_size": 48,
}  # fmt: skip
# At the same number of tokens, smaller batches learn more; in the same time, fewer layers do.
TINY_RTD = TINY | {
    "num_training_steps": 5000, "dump_interval": 1250, "log_interval": 100, "warmup": 200.0,
    "learning_rate": 1.5e-3, "train_batch_size": 16, "adam_beta2": 0.98,
}  # fmt: skip
# Absolute positions are learned separately: with 128 of them, a small BERT ignores word order for many steps.
TINY_BERT = TINY | {
    "num_training_steps": 800, "dump_interval": 400, "warmup": 60.0,
    "train_batch_size": 128, "adam_beta2": 0.98,
}  # fmt: skip

PRESETS = {
    "bert-tiny": Preset("MLM", "bert_tiny.json", TINY_BERT, "sample", 32),
    "deberta-tiny": Preset("MLM", "deberta_tiny.json", TINY | {"max_ngram": 3}, "sample", 128),
    "bert-base": Preset("MLM", "bert_base.json", FULL_MLM | {"max_ngram": 1}),
    "deberta-base": Preset("MLM", "deberta_base.json", FULL_MLM),
    "xlarge-v2": Preset("MLM", "deberta_xlarge.json", LARGE_MLM),
    "xxlarge-v2": Preset("MLM", "xxlarge.json", LARGE_MLM),
    "deberta-v3-tiny": Preset("RTD", "rtd_tiny.json", TINY_RTD, "sample", 128),
    "deberta-v3-xsmall": Preset("RTD", "rtd_xsmall.json", XSMALL_RTD),
    "deberta-v3-small": Preset("RTD", "rtd_small.json", FULL_RTD),
    "deberta-v3-base": Preset("RTD", "rtd_base.json", FULL_RTD),
    "deberta-v3-large": Preset("RTD", "rtd_large.json", FULL_RTD),
    # The public xsmall checkpoint is wider (384) than the model trained from scratch (256).
    "deberta-v3-xsmall-continue": Preset("RTD", "rtd_xsmall_continue.json", CONTINUE, is_continued=True),
    "deberta-v3-small-continue": Preset("RTD", "rtd_small.json", CONTINUE, is_continued=True),
    "deberta-v3-base-continue": Preset(
        "RTD", "rtd_base.json", CONTINUE, is_continued=True, has_generator=False
    ),
    "deberta-v3-large-continue": Preset("RTD", "rtd_large.json", CONTINUE, is_continued=True),
}


def find_preset(name: str, task_name: str | None = None) -> Preset:
    """Return a preset by name.

    `task_name` limits the choice to presets of one task. Raises `UsageError` with the closest names if there
    is no such preset.
    """
    names = [known for known, preset in PRESETS.items() if task_name in (None, preset.task_name)]
    if name in names:
        return PRESETS[name]
    script = {"MLM": "./mlm.sh NAME", "RTD": "./rtd.sh NAME", None: "--preset NAME"}[task_name]
    usage = f"usage: {script} [flags], with NAME one of {', '.join(names)}; --help lists the flags"
    if not name:
        raise UsageError(f"no preset given; {usage}")
    if name in PRESETS:
        raise UsageError(f"{name} is a preset for {PRESETS[name].task_name}, not for {task_name}; {usage}")
    closest = difflib.get_close_matches(name, names)
    hint = f": the closest names are {', '.join(closest)}" if closest else ""
    raise UsageError(f"no preset {name!r}{hint}; {usage}")


def guess_preset(train: Mapping[str, Any]) -> str | None:
    """Return the name of the preset that a run was started from, or None.

    It is the tag, as by default. Under another tag it is the first preset with the model config in `train`.
    """
    if train.get("tag") in PRESETS:
        return train["tag"]
    is_continued = bool(train.get("init_model") or train.get("init_discriminator"))
    kind = (train.get("model_config"), is_continued)
    return next((name for name, p in PRESETS.items() if (p.model_config, p.is_continued) == kind), None)


def read_preset(name: str, corpus: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the `TrainConfig` fields that a preset sets.

    `corpus` names the text to use in place of the preset's own. `given` has the flags that override the
    preset. The path of the prepared text follows from the corpus, `--max_seq_length` and `--vocab_path`.
    Raises `UsageError` for an unknown preset, and for a published model without a generator.
    """
    preset = find_preset(name, given.get("task_name"))
    weights = {}
    if preset.is_continued and given.get("do_train", True):
        published = f"hf:microsoft/{name.removesuffix('-continue')}"
        weights = {"init_generator": published, "init_discriminator": published}
        if not preset.has_generator and "init_generator" not in given:
            raise UsageError(
                f"{published.removeprefix('hf:')} was published without its generator: give {name} "
                "--init_generator from-discriminator, which starts one with the first half of the "
                "discriminator's layers, or the file of a generator"
            )
    values = {
        "task_name": preset.task_name,
        "tag": name,
        "do_train": True,
        "model_config": preset.model_config,
        "max_seq_length": preset.max_seq_length,
        **preset.flags,
        **weights,
    }
    if "data_dir" not in given:
        corpus, length = corpus or preset.corpus, given.get("max_seq_length", preset.max_seq_length)
        folder, vocabulary = get_cache_dir() / corpus / str(length), choose_vocabulary(preset, corpus)[0]
        if vocabulary != CORPORA[corpus][0]:
            folder = folder.with_name(f"{length}-published")
        if "vocab_path" in given:  # another vocabulary gives another text
            if not Path(given["vocab_path"]).is_file():
                raise UsageError(f"--vocab_path {given['vocab_path']}: there is no such file; check the path")
            folder = folder.with_name(f"{length}-{hash_file(Path(given['vocab_path']))[:8]}")
        values |= {"data_dir": str(folder), "vocab_path": str(get_cache_dir() / vocabulary)}
    return values


def choose_vocabulary(preset: Preset, corpus: str) -> tuple[str, int]:
    """Return the entry of `CORPORA` with the vocabulary.

    It is that of published weights, if any, else that of the text.
    """
    return CORPORA["wikitext-103" if preset.is_continued else corpus]


def list_preparation(flags: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Return the flags of `prepare_data.py` that prepare the text of a preset.

    The list is empty if `--data_dir` is given.

    Args:
        flags: the flags given on the training command line, `preset` included.
        config: the settings that these flags resolve to.
    """
    if "data_dir" in flags:
        return []
    preset = PRESETS[flags["preset"]]
    corpus = flags.get("corpus") or preset.corpus
    arguments = ["--corpus", corpus, "--output", config.data_dir]
    arguments += ["--max_seq_length", str(config.max_seq_length)]
    pieces = choose_vocabulary(preset, corpus)[1]
    if "vocab_path" in flags:
        arguments += ["--vocab_path", flags["vocab_path"]]
    elif pieces:
        arguments += ["--train_vocab", str(pieces)]
    return arguments
