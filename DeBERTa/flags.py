"""Command line: the fields of `TrainConfig` as flags.

Flags override a preset, or the settings of a run.
Nothing here loads torch, so that `prepare_data.py` can read the flags of the training command.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import DeBERTa
from DeBERTa.config import HIDDEN, TrainConfig, read_json
from DeBERTa.errors import ConfigError, UsageError
from DeBERTa.presets import CORPORA, PRESETS, read_preset

USAGE = """python -m DeBERTa.train [flags]
       python -m DeBERTa.train --preset NAME [flags]
       ./mlm.sh NAME [flags]    with a preset for MLM
       ./rtd.sh NAME [flags]    with a preset for RTD"""
REPLACED = {"--zero": "--sharding zero2", "--fsdp": "--sharding fsdp"}
PUBLISHED_SPELLINGS = {"max_seq_len": "max_seq_length", "dump": "dump_interval"}  # of the published scripts


class FlagParser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing the usage.

    The message for an unknown flag has the closest known flag.
    """

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` with the message."""
        raise UsageError(f"{message}; --help lists the flags")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values by name.

        Raises `UsageError` for an unknown flag or a positional argument.
        """
        values, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag in REPLACED:
                self.error(f"no flag {flag}: it was replaced, give {REPLACED[flag]}")
            if flag in PRESETS:
                self.error(f"unexpected argument {flag!r}: give --preset {flag}")
            if not flag.startswith("-"):
                self.error(f"unexpected argument {flag!r}: flags begin with --")
            known = re.findall(r"--\w+", self.format_help())
            longer = sorted({name for name in known if name.startswith(flag)})
            closest = " or ".join(longer or difflib.get_close_matches(flag, known, n=1))
            self.error(f"no flag {flag}: did you mean {closest}" if closest else f"no flag {flag}")
        return vars(values)


def parse_flags(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of a run."""
    return build_config(read_flags(argv))


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the given flags by name.

    `--help` and `--version` print and raise `SystemExit`.
    """
    parser = FlagParser(
        usage=USAGE,
        description="Pre-train a DeBERTa encoder.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"DeBERTa pre-training {DeBERTa.__version__}")
    group = parser.add_argument_group("where the flags start from")
    group.add_argument(
        "--preset", nargs="?", const="", metavar="NAME", help=f"a recipe, with its data: {', '.join(PRESETS)}"
    )
    group.add_argument("--corpus", choices=CORPORA, help="text to train the preset on, in place of its own")
    group.add_argument("--config", metavar="FILE", help="the config.json of a run, to repeat it")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        group.add_argument(f"--{field.name}", **_describe(field, hints[field.name]))
    for spelling, name in PUBLISHED_SPELLINGS.items():
        parser.add_argument(f"--{spelling}", dest=name, type=int, help=argparse.SUPPRESS)
    return parser.read(argv)


def _describe(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for one field."""
    metadata = field.metadata
    default = "none" if field.default in ("", None) else field.default
    unit = f"{metadata['unit']}; " if metadata["unit"] else ""
    text = f"{metadata['help']} ({unit}default: {default})".replace("%", "%%")
    form: dict[str, Any] = {"help": argparse.SUPPRESS if HIDDEN in metadata["rules"] else text}
    if hint is bool or bool in typing.get_args(hint):
        return form | {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
    if isinstance(metadata["limit"], tuple):
        return form | {"choices": metadata["limit"]}
    return form | {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def parse_bool(text: str) -> bool:
    """Return the truth value that `text` stands for."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def build_config(flags: dict[str, Any]) -> TrainConfig:
    """Return the settings from defaults and flags.

    Defaults are overridden by `--preset` or `--config`, and these by the other flags.
    """
    given = {name: value for name, value in flags.items() if name not in ("preset", "config", "corpus")}
    if "preset" in flags and "config" in flags:
        raise UsageError("--preset and --config both say where the flags start from: give one of them")
    if "corpus" in flags and "preset" not in flags:
        raise UsageError("--corpus is the text of a preset: give --preset, or --data_dir and --vocab_path")
    values = read_preset(flags["preset"], flags.get("corpus"), given) if "preset" in flags else {}
    if "config" in flags:
        values = read_settings(flags["config"])
        if "tag" in given:
            values.pop("output_dir")  # of the run that is repeated
    if "num_train_epochs" in given:
        values.pop("num_training_steps", None)
    values |= given
    return TrainConfig(**values)


def read_settings(path: str) -> dict[str, Any]:
    """Return the settings in the `config.json` of a run.

    The model config is included. Compatibility aliases are omitted, since the file has their resolved
    values. `fresh` is omitted, since it is an action.
    """
    values = read_json(path).get("train")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not the config.json of a run: it has no section 'train'")
    config = TrainConfig.from_dict(values, f"{path}: train")
    omitted = {"fresh", *(f.name for f in dataclasses.fields(config) if HIDDEN in f.metadata["rules"])}
    return {k: v for k, v in config.to_dict().items() if k not in omitted} | {"model_config": path}
