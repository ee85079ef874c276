"""Model card: recipe, data and results of a run, and a picture of its losses."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from DeBERTa import __version__
from DeBERTa.errors import DataError
from DeBERTa.report.charts import HEIGHT, LEFT, WIDTH, build_charts, draw_svg
from DeBERTa.report.read import RunRecord, is_number, read_run

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
    "discriminator_learning_rate", "lr_schedule", "warmup", "weight_decay", "adam_beta1", "adam_beta2",
    "max_grad_norm", "max_ngram", "rtd_lambda", "decoupled_training", "replay_share", "precision", "seed",
)  # fmt: skip
NO_RESULTS = ("step", "elapsed_seconds")
TITLE_HEIGHT = 40  # above a chart, in pixels
COLORS = ("#1f5fa8", "#c2570c", "#23804a", "#8a3ea8", "#b3261e", "#0f7f86", "#7a6000", "#5b6570")
STYLE = (
    "text { fill: #5b6570; font: 11px sans-serif } .grid { stroke: #dfe3e6 } .curve { fill: none }"
    + "".join(f" .c{number} {{ stroke: {color} }}" for number, color in enumerate(COLORS))
)


def read_record(run_dir: Path, step: float = math.inf) -> RunRecord | None:
    """Return what is known of a run up to `step`, or None without metrics."""
    with contextlib.suppress(DataError):
        run = read_run(run_dir)
        if rows := [row for row in run.rows if row["step"] <= step]:
            return dataclasses.replace(run, rows=rows)
    return None


def format_card(name: str, config: dict[str, Any], run: RunRecord | None) -> str:
    """Return the model card in Markdown.

    config: the content of the model's `config.json`.
    """
    (auto_class,) = config["auto_map"]
    pipeline_tag = "pipeline_tag: fill-mask\n" if auto_class == "AutoModelForMaskedLM" else ""
    sections = [
        f"---\nlibrary_name: transformers\n{pipeline_tag}tags:\n- deberta-v2\n---",
        f"# {run.train.get('tag', run.name) if run else 'DeBERTa'}: {name}",
        f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide, {config['vocab_size']:,} rows "
        f"in the word table; trained with DeBERTa pre-training {__version__}.",
        "`AutoModel` and `AutoTokenizer` load encoder and tokenizer. The head needs the code in this "
        f"directory:\n\n```python\n{USAGE[auto_class]}\n```",
        *(_format_run(run) if run else ()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _format_run(run: RunRecord) -> list[str]:
    """Return the sections about recipe, data, results and losses."""
    recipe = {name: run.train[name] for name in RECIPE if name in run.train}
    if not run.train.get("replay"):
        recipe.pop("replay_share", None)
    last: dict = next((row for row in reversed(run.rows) if row["kind"] == "valid"), {})
    results = {k: f"{v:.5g}" for k, v in last.items() if is_number(v) and k not in NO_RESULTS}
    return [
        _format_table(f"Recipe, up to step {run.step:,}", recipe),
        _format_table("Data", run.settings.get("data", {})),
        _format_table(f"Validation at step {last.get('step', 0):,}", results),
        "![losses by step](curves.svg)",
    ]


def _format_table(title: str, values: dict[str, Any]) -> str:
    """Return a section with a table of what is not None, empty without values."""
    rows = [f"| {name} | {value} |" for name, value in values.items() if value is not None]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *rows]) if rows else ""


def draw_curves(run: RunRecord) -> str:
    """Return an SVG file with the charts of the losses."""
    charts = [chart for chart in build_charts([run]) if "loss" in chart[0].title.lower()]
    height = len(charts) * (HEIGHT + TITLE_HEIGHT)
    parts = [f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="white"/>']
    for number, (kind, found) in enumerate(charts):
        curves = [curve for curve in found if "entropy" not in curve.label]
        top = number * (HEIGHT + TITLE_HEIGHT)
        legend = " ".join(f'<tspan style="fill: {COLORS[c.color]}">{c.label}</tspan>' for c in curves)
        parts.append(f'<text x="{LEFT}" y="{top + 16}">{kind.title} ({kind.unit}) by step</text>')
        parts.append(f'<text x="{LEFT}" y="{top + 32}">{legend}</text>')
        place = f'<svg y="{top + TITLE_HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(draw_svg(kind, curves).replace("<svg ", place, 1))
    size = f'width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'
