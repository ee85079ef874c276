"""Export the models of a run: `python -m DeBERTa.export --help`."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from DeBERTa.command import run_command
from DeBERTa.config import ModelConfig, RTDConfig, read_json
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError, VocabularyError
from DeBERTa.files import raise_storage_errors
from DeBERTa.flags import FlagParser
from DeBERTa.hub.export import list_models, write_model, write_published
from DeBERTa.hub.model_card import read_record
from DeBERTa.hub.onnx import require_onnx
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel, build_model
from DeBERTa.training.checkpoint import find_newest_valid, get_checkpoint_path, list_steps, read_model, verify

DESCRIPTION = (
    "Write the models of a run as directories that AutoModel and AutoTokenizer of transformers open."
)

logger = logging.getLogger("DeBERTa.export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: export(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags."""
    parser = FlagParser(prog="python -m DeBERTa.export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory: output/TAG")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export/step-N")
    formats = parser.add_mutually_exclusive_group()
    published = "write the .bin files of the published code instead"
    formats.add_argument("--published-format", action="store_true", help=published)
    onnx = "write the encoders as model.onnx, too (needs onnx and onnxscript)"
    formats.add_argument("--onnx", action="store_true", help=onnx)
    return parser.parse_args(argv)


def export(arguments: argparse.Namespace) -> None:
    """Export one checkpoint, and log what was written."""
    run_dir: Path = arguments.run
    if arguments.onnx:
        require_onnx()
    step = find_step(run_dir, arguments.step)
    settings = read_json(get_checkpoint_path(run_dir, step) / "config.json")
    model = load_checkpoint(run_dir, step, settings)
    tokenizer = find_vocabulary(run_dir, settings)
    output: Path = arguments.output or run_dir / "export" / f"step-{step:08d}"
    run = read_record(run_dir, step)
    with raise_storage_errors(output, "the export", "give another --output", "--output"):
        if arguments.published_format:
            directory: Path = arguments.output or output / "published"
            directory.parent.mkdir(parents=True, exist_ok=True)
            write_published(model, directory, tokenizer.path)
            logger.info("published format: %s", directory)
            return
        output.mkdir(parents=True, exist_ok=True)
        for exported in list_models(model):
            write_model(exported, output / exported.name, tokenizer, run, arguments.onnx)
            logger.info("%s: %s", exported.name, output / exported.name)


def find_step(run_dir: Path, step: int | None) -> int:
    """Return the step to export: the given one or the newest valid one.

    Raises `ConfigError` when the run has no such checkpoint, and `DamagedCheckpointError` when it is damaged.
    """
    steps = list_steps(run_dir)
    if not steps:
        raise ConfigError(f"{run_dir}: no checkpoints; give the directory of a run, such as output/TAG")
    if step is None:
        step, damages = find_newest_valid(run_dir)
        for damage in damages:
            logger.warning("%s; taking step %d", damage, step)
        return step
    if step not in steps:
        saved = ", ".join(map(str, steps))
        raise ConfigError(f"--step {step}: {run_dir} has no such checkpoint; it has {saved}")
    verify(get_checkpoint_path(run_dir, step))
    return step


def load_checkpoint(run_dir: Path, step: int, settings: dict) -> MaskedLanguageModel | RTDModel:
    """Build the model of a run with the weights of `step`."""
    kind = RTDConfig if "generator" in settings["model"] else ModelConfig
    with torch.device("meta"):
        model = build_model(kind.from_dict(settings["model"]))
    model.load_state_dict(read_model(run_dir, step, model), assign=True)
    return model


def find_vocabulary(run_dir: Path, settings: dict) -> Tokenizer:
    """Return the vocabulary that the run was trained with.

    It is at `--vocab_path` of the run, or next to a final model. Raises `ConfigError` when it is in neither
    place.
    """
    wanted = settings["data"]["vocabulary_sha256"]
    recorded = Path(settings["train"]["vocab_path"])
    for path in (recorded, *sorted(run_dir.glob("*/spm.model"))):
        with contextlib.suppress(VocabularyError):  # the recorded path holds another file now
            if path.is_file() and (tokenizer := Tokenizer(path)).fingerprint == wanted:
                return tokenizer
    raise ConfigError(
        f"the vocabulary of {run_dir} is missing: {recorded} is not the one it was trained with; "
        f"copy it to {run_dir / 'model' / 'spm.model'}"
    )


if __name__ == "__main__":
    sys.exit(main())
