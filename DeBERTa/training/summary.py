"""Summary at the end of a run: how it went, where things are, what to do next."""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from DeBERTa.config import read_json
from DeBERTa.errors import ConfigError
from DeBERTa.hub.model_card import read_record
from DeBERTa.report.read import format_duration
from DeBERTa.training.checkpoint import select_loss

NEXT = {  # by the name of a final model: a command to see what it learned
    "discriminator": 'python -m DeBERTa.detect {} "A sentence with a banana word."',
    "model": 'python -m DeBERTa.fill_mask {} "A sentence with a [MASK] word."',
}


def describe_end(run_dir: Path, models: Sequence[Path]) -> dict[str, str]:
    """Return the summary of a run.

    It has steps and time, the best checkpoint, final models, report, and the next command.
    """
    rows = {}
    if run := read_record(run_dir):
        elapsed = max(row.get("elapsed_seconds") or 0.0 for row in run.rows)  # older runs lack it
        rows["trained"] = f"{run.step:,} steps in {format_duration(elapsed)}"
    with contextlib.suppress(ConfigError):  # without a validation split there is none
        best = read_json(run_dir / "checkpoints" / "best.json")
        checkpoint = run_dir / "checkpoints" / best["checkpoint"]
        losses = [f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in select_loss(best).items()]
        rows["best"] = f"step {best['step']:,}, validation {', '.join(losses)}: {checkpoint}"
    rows["final models"] = ", ".join(map(str, models))
    if (report := run_dir / "report.html").is_file():  # a failed write was logged
        rows["report"] = str(report)
    rows["next"] = NEXT[models[-1].name].format(shlex.quote(str(models[-1])))
    return rows
