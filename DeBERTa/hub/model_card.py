"""Model card: recipe, data and results of the run of a model, and a picture of its losses."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from DeBERTa import __version__

USAGE = {
    "AutoModelForMaskedLM": """\
from transformers import pipeline

fill = pipeline("fill-mask", "THIS_DIRECTORY", trust_remote_code=True)
fill("The capital of France is [MASK].")""",
    "AutoModelForPreTraining": """\
from transformers import AutoModelForPreTraining, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
model = AutoModelForPreTraining.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
inputs = tokenizer("The capital of France is banana.", return_tensors="pt")
model(**inputs).logits.sigmoid()  # per token: the probability that it was replaced""",
}
RECIPE = (
    "task_name", "num_training_steps", "train_batch_size", "max_seq_length", "learning_rate",
    "discriminator_learning_rate", "warmup", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "max_ngram", "rtd_lambda", "decoupled_training", "precision", "seed",
)  # fmt: skip
LOSSES = ("loss", "generator_loss", "discriminator_loss")
WIDTH, HEIGHT, MARGIN = 640, 200, 50  # of one plot, in pixels


@dataclass(frozen=True)
class RunRecord:
    """What is known of the run of a model: settings as resolved, and lines of `metrics.jsonl`."""

    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path, step: float = math.inf) -> "RunRecord":
        """Read what a run directory has, up to `step`."""
        settings, metrics = run_dir / "config.json", run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return cls(
            json.loads(settings.read_text()) if settings.exists() else {},
            [line for line in map(json.loads, lines) if line["step"] <= step],
        )


def format_card(name: str, config: dict[str, Any], record: RunRecord) -> str:
    """Return the model card in Markdown.

    config: the content of the model's `config.json`.
    """
    (auto_class,) = config["auto_map"]
    train, data = record.settings.get("train", {}), record.settings.get("data", {})
    evaluated = [line for line in record.metrics if line["kind"] == "valid"]
    results = {k: v for k, v in evaluated[-1].items() if isinstance(v, float)} if evaluated else {}
    results.pop("elapsed_seconds", None)
    pipeline_tag = "pipeline_tag: fill-mask\n" if auto_class == "AutoModelForMaskedLM" else ""
    sections = [
        f"---\nlibrary_name: transformers\n{pipeline_tag}tags:\n- deberta-v2\n---",
        f"# {train.get('tag', 'DeBERTa')}: {name}",
        f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide, {config['vocab_size']:,} rows "
        f"in the word table; trained with DeBERTa pre-training {__version__}.",
        "`AutoModel` and `AutoTokenizer` load encoder and tokenizer. The head needs the code in this "
        f"directory:\n\n```python\n{USAGE[auto_class]}\n```",
        _format_table("Recipe", {name: train[name] for name in RECIPE if name in train}),
        _format_table("Data", data),
        _format_table(f"Validation at step {evaluated[-1]['step']:,}" if evaluated else "", results),
    ]
    if draw_curves(record.metrics):
        sections.append("![losses by step](curves.svg)")
    return "\n\n".join(section for section in sections if section) + "\n"


def _format_table(title: str, values: dict[str, Any]) -> str:
    if not values:
        return ""
    rows = [
        f"| {name} | {f'{value:.6g}' if isinstance(value, float) else value} |"
        for name, value in values.items()
    ]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *rows])


def draw_curves(metrics: list[dict[str, Any]]) -> str:
    """Return an SVG picture with a plot per loss, or an empty string without two points of any.

    Lines are training losses, circles are validation losses.
    """
    plots: list[str] = []
    for name in LOSSES:
        points = {
            kind: [
                (line["step"], line[name])
                for line in metrics
                if line["kind"] == kind and line.get(name) is not None
            ]
            for kind in ("train", "valid")
        }
        if len(points["train"]) > 1:
            plots.append(_draw_plot(name, points["train"], points["valid"], len(plots) * HEIGHT))
    if not plots:
        return ""
    size = f'width="{WIDTH}" height="{len(plots) * HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *plots, "</svg>\n"])


def _draw_plot(name: str, train: list[tuple[int, float]], valid: list[tuple[int, float]], top: int) -> str:
    """Return one plot of points (step, loss), with its upper edge at `top`."""
    steps, losses = zip(*train, *valid, strict=True)
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    left, bottom = MARGIN, top + HEIGHT - MARGIN // 2

    def place(point: tuple[int, float]) -> tuple[str, str]:
        x = left + (point[0] - first) / max(last - first, 1) * (WIDTH - 2 * MARGIN)
        y = bottom - (point[1] - low) / ((high - low) or 1) * (HEIGHT - MARGIN)
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(place(point)) for point in train)
    circles = "".join(
        '<circle cx="{}" cy="{}" r="3" fill="#c8553d"/>'.format(*place(point)) for point in valid
    )
    labels = [
        (left, top + 16, f"{name.replace('_', ' ')} by step (line: training, circles: validation)"),
        (4, bottom, f"{low:.3g}"),
        (4, top + MARGIN // 2 + 4, f"{high:.3g}"),
        (left, bottom + 16, f"{first:,}"),
        (WIDTH - MARGIN, bottom + 16, f"{last:,}"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
    return f'<polyline points="{line}" fill="none" stroke="#1f6fb4"/>{circles}{texts}'
