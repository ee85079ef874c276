"""Best checkpoint by validation loss.

`checkpoints/best.json` records it, and pruning does not remove it.
"""

from pathlib import Path

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, write_json

BEST_BY = ("discriminator_loss", "loss")  # the first that an evaluation has


def find_best(run_dir: Path, evaluations: dict[int, dict]) -> int | None:
    """Return the saved step with the lowest validation loss.

    Returns the earliest of equal ones, and None if no saved step was evaluated.
    """
    losses = {}
    for step in list_steps(run_dir):
        if step in evaluations:
            _, loss = select_loss(evaluations[step])
            if loss is not None:
                losses[step] = loss
    return min(losses, key=losses.__getitem__, default=None)


def select_loss(metrics: dict) -> tuple[str, float | None]:
    """Return name and value of the loss that selects the best checkpoint.

    The value is None where it, or the generator's loss, was not finite or undefined.
    """
    name = next(name for name in BEST_BY if name in metrics)
    return name, None if metrics.get("generator_loss", 0.0) is None else metrics[name]


def record_best(run_dir: Path, evaluations: dict[int, dict]) -> None:
    """Write `checkpoints/best.json`, or remove it when no saved step was evaluated."""
    path = run_dir / "checkpoints" / "best.json"
    step = find_best(run_dir, evaluations)
    if step is None:
        path.unlink(missing_ok=True)
    else:
        name, loss = select_loss(evaluations[step])
        write_json(path, {"step": step, "checkpoint": get_checkpoint_path(run_dir, step).name, name: loss})
