"""Charts of one run or several, as inline SVG.

With one run, curves differ in color. With several, a run has one color, and its curves differ in dashes.
"""

import html
import math
import re
from typing import NamedTuple

from DeBERTa.report.read import Points, RunRecord, format_number

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins
MOST_POINTS = 300  # of a curve; more would not be visible
COLORS = 8  # in style.css
DASHES = ("none", "5 3", "1.5 2.5", "8 3 2 3")
NOT_DRAWN = {"step", "elapsed_seconds", "tokens_seen", "skipped_steps", "mean", "sigma"}


class Kind(NamedTuple):
    """A kind of chart: the metrics whose names match `pattern`."""

    title: str
    unit: str
    pattern: str
    is_log: bool = False


KINDS = (
    Kind("Loss on masked tokens", "nats per token", r"(generator_)?loss"),
    Kind("Discriminator loss", "nats per token", r"discriminator_loss|.*entropy.*"),
    Kind("ROC AUC", "0.5 is chance", r".*_auc"),
    Kind("Precision and recall of “replaced”", "share", r".*(precision|recall).*"),
    Kind("Discriminator accuracy", "share", r"discriminator_accuracy|.*majority.*"),
    Kind("Accuracy on masked tokens", "share", r"(generator_)?accuracy"),
    Kind("Perplexity", "logarithmic", r"(.*_)?perplexity", True),
    Kind("Replaced tokens", "share of all tokens", r".*replaced"),
    Kind("Drift of the GDES residual", "relative to the generator's table", r"residual_drift"),
    Kind("Probes of grammar", "accuracy; docs/evaluation.md", r"probe_.*"),
    Kind("Learning rate", "", r".*learning_rate"),
    Kind("Gradient norm", "before clipping, logarithmic", r".*grad_norm", True),
    Kind("Throughput", "tokens per second", r"tokens_per_second"),
    Kind("Peak memory", "GB, rank 0", r"peak_memory_gb"),
    Kind("Other metrics", "", r".*"),
)


class Curve(NamedTuple):
    """One line of a chart; `color` and `dash` are indices."""

    label: str
    points: Points
    color: int
    dash: int


Chart = tuple[Kind, list[Curve]]


def build_charts(runs: list[RunRecord]) -> list[Chart]:
    """Return the charts for which the runs have metrics."""
    rows = [row for run in runs for row in run.rows if row["kind"] != "spike"]
    left = {(row["kind"], name) for row in rows for name in row.keys() - NOT_DRAWN}  # split and metric
    charts = []
    for kind in KINDS:
        keys = {key for key in left if re.fullmatch(kind.pattern, key[1])}
        left -= keys
        curves = []
        for style, (split, name) in enumerate(sorted(keys)):
            splits, names = map(set, zip(*keys, strict=True))
            words = [split] * (len(splits) > 1 or len(names) == 1) + name.split("_") * (len(names) > 1)
            label = " ".join(words)
            for number, run in enumerate(runs):
                if points := run.list_values(name, split):
                    color, dash, prefix = (number, style, f"{run.name}: ") if runs[1:] else (style, 0, "")
                    curves.append(Curve(prefix + label, points, color % COLORS, dash % len(DASHES)))
        if curves:
            charts.append((kind, curves))
    return charts


def thin_out(points: Points) -> Points:
    """Return at most `MOST_POINTS` points: means of neighbors, and the last one."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [*((group[-1][0], sum(y for _, y in group) / len(group)) for group in groups), points[-1]]


def choose_ticks(low: float, high: float, is_log: bool = False) -> list[float]:
    """Return a few round values from `low` to `high`."""
    if is_log and high / low > 20:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(powers) < 4 else (1,)
        return [tick for power in powers for f in factors if low <= (tick := f * 10.0**power) <= high]
    spacing = 10.0 ** math.floor(math.log10((high - low) / 4))
    spacing *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * spacing) <= 5)
    return [i * spacing for i in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]


def draw_svg(kind: Kind, curves: list[Curve]) -> str:
    """Return a chart as an SVG element, with axes and without its legend."""
    lines = [thin_out(curve.points) for curve in curves]
    values = [y for points in lines for _, y in points]
    low, high, last = min(values), max(values), max(max(points)[0] for points in lines)
    is_log = kind.is_log and high > 0
    if is_log:  # a value of 0 is at the bottom
        low = min(value for value in values if value > 0)
    if high - low <= 1e-3 * abs(high):
        low, high = low - 0.05 * abs(low), high + 0.05 * (abs(high) or 1)

    def place(x: float, y: float) -> tuple[float, float]:
        bottom, top, value = (math.log(max(v, low)) if is_log else v for v in (low, high, y))
        across = LEFT + x / max(last, 1) * (WIDTH - LEFT - RIGHT)
        height = (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(HEIGHT - BOTTOM - height, 1)

    parts = []
    for y in choose_ticks(low, high, is_log):
        _, height = place(0, y)
        parts.append(f'<path class="grid" d="M{LEFT},{height}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{height + 4}" text-anchor="end">{format_number(y)}</text>')
    for x in choose_ticks(0, max(last, 1)):
        across, _ = place(x, low)
        anchor = "middle" if across < WIDTH - 20 else "end"  # or the last label would be cut off
        parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="{anchor}">{format_number(x)}</text>')
    for curve, points in zip(curves, lines, strict=True):
        places, style = [place(*point) for point in points], f'class="curve c{curve.color}"'
        tag, shape = "circle", 'cx="{}" cy="{}" r="3"'.format(*places[0])
        if len(places) > 1:
            path = " ".join(f"{x},{y}" for x, y in places)
            tag, shape = "polyline", f'stroke-dasharray="{DASHES[curve.dash]}" points="{path}"'
        parts.append(f"<{tag} {style} {shape}><title>{html.escape(curve.label)}</title></{tag}>")
    label = html.escape(f"{kind.title} by step")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
