"""Best checkpoint by validation loss.

`checkpoints/best.json` records it, and pruning does not remove it.
"""

import math
from pathlib import Path

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, write_json

BEST_BY = ("discriminator_loss", "loss")  # the first that an evaluation has


def find_best(run_dir: Path, evaluations: dict[int, dict]) -> int | None:
    """Return the saved step with the lowest validation loss.

    Returns the earliest of equal ones, and None if no saved step was evaluated.
    """
    saved = [step for step in list_steps(run_dir) if step in evaluations]
    losses = {step: loss for step in saved for loss in select_loss(evaluations[step]).values()}
    return min(losses, key=losses.__getitem__, default=None)


def select_loss(metrics: dict) -> dict[str, float]:
    """Return the loss that selects the best checkpoint, by its name.

    The result is empty where it, or the generator's loss, was not finite or undefined.
    """
    name = next((name for name in BEST_BY if name in metrics), "")
    loss = metrics.get(name) if metrics.get("generator_loss", 0.0) is not None else None
    return {name: loss} if isinstance(loss, int | float) and math.isfinite(loss) else {}


def record_best(run_dir: Path, evaluations: dict[int, dict]) -> None:
    """Write `checkpoints/best.json`, or remove it when no saved step was evaluated."""
    path = run_dir / "checkpoints" / "best.json"
    step = find_best(run_dir, evaluations)
    if step is None:
        path.unlink(missing_ok=True)
    else:
        values = {"step": step, "checkpoint": get_checkpoint_path(run_dir, step).name}
        write_json(path, values | select_loss(evaluations[step]))
