"""The report as one HTML page: no network, no scripts, light and dark."""

import logging
from collections.abc import Iterable
from html import escape
from pathlib import Path

from DeBERTa.config import TrainConfig
from DeBERTa.data.tokenizer import WORD_MARK
from DeBERTa.errors import DebertaError
from DeBERTa.files import open_atomic
from DeBERTa.report.charts import DASHES, Chart, build_charts, draw_svg
from DeBERTa.report.health import examine
from DeBERTa.report.read import RunRecord, format_number, read_run

STEPS_SHOWN = 6  # of the predictions for a sentence
EVENTS_SHOWN = 50
STYLE = Path(__file__).with_name("style.css")
HEAD = '<!DOCTYPE html><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
SAMPLES_LEGEND = (
    "Underlined: masked, with the token that the generator put there and its probability of the original. "
    "The redder a token, the surer the discriminator that it was replaced."
)

logger = logging.getLogger(__name__)


def update_report(run_dir: Path) -> None:
    """Write the report of a run that is training.

    An error is logged, and the run continues.
    """
    try:
        write_report([read_run(run_dir)], run_dir / "report.html")
    except DebertaError as error:
        logger.warning("no report.html: %s; the run continues", error)
    except Exception as error:
        logger.warning("no report.html: %s: %s; the run continues", type(error).__name__, error)


def write_report(runs: list[RunRecord], path: Path) -> None:
    """Write the page about one run, or the comparison of several."""
    page = format_page(runs).encode(errors="replace")  # names of files may be no text
    # Locked no longer than needed: training writes here, too, and never into a directory that it makes again.
    with open_atomic(path, parents=False) as file:
        file.write(page)


def format_page(runs: list[RunRecord]) -> str:
    """Return the page."""
    names = " and ".join(run.name for run in runs)
    parts = [format_head(run) + format_health(run) for run in runs]
    charts = "".join(map(format_chart, build_charts(runs)))
    parts.append(f"<h2>Curves by step</h2><div class=grid>{charts}</div>")
    if len(runs) == 1:
        parts += [format_samples(runs[0]), format_events(runs[0])]
    parts += [format_recipe(runs), format_environment(runs)]
    return f"{HEAD}<title>{escape(names)}</title><style>{STYLE.read_text()}</style>{''.join(parts)}\n"


def format_head(run: RunRecord) -> str:
    """Return the name and the progress of a run."""
    share = f"step {run.step:,} of {run.total_steps:,}"
    when = escape(str(run.rows[-1].get("time", ""))[:16].replace("T", " "))
    progress = f"<progress max={run.total_steps} value={run.step}>{share}</progress>"
    about = f"{escape(str(run.train.get('task_name', '')))}, {share}, last line of {when} UTC"
    return f"<h1>{escape(run.name)}</h1><p class=soft>{about}</p>{progress}"


def format_health(run: RunRecord) -> str:
    """Return what is usual and what is not."""
    cards = "".join(
        f"<div class='card finding {level}'><b>{level}</b><h3>{escape(title)}</h3><p>{escape(text)}</p></div>"
        for level, title, text in examine(run)
    )
    return f"<h2>Health</h2><div class=grid>{cards}</div>"


def format_chart(chart: Chart) -> str:
    """Return a chart with its legend, which has the last values."""
    kind, curves = chart
    legend = "".join(
        f"<span><svg viewBox='0 0 24 8'><path class='curve c{curve.color}' d='M1,4H23' "
        f"stroke-dasharray='{DASHES[curve.dash]}'/></svg>{escape(curve.label)} "
        f"{format_number(curve.points[-1][1])}</span>"
        for curve in curves
    )
    head = f"<h3>{escape(kind.title)} <small>{escape(kind.unit)}</small></h3>"
    return f"<div class=card>{head}{draw_svg(kind, curves)}<div class=legend>{legend}</div></div>"


def format_samples(run: RunRecord) -> str:
    """Return the predictions for the fixed validation sentences, at a few steps each."""
    lines = [line for line in run.samples.values() if line.get("sentences")]
    if not lines:
        return ""
    shown = lines[:: -(-len(lines) // STEPS_SHOWN)]
    shown += [] if shown[-1] is lines[-1] else [lines[-1]]
    tables = ""
    for number in range(min(len(line["sentences"]) for line in shown)):
        tables += format_table((line["step"], format_sentence(line["sentences"][number])) for line in shown)
    return f"<h2>Predictions on validation text</h2><p class=soft>{SAMPLES_LEGEND}</p>{tables}"


def format_sentence(tokens: list[dict]) -> str:
    """Return a sentence of `samples.jsonl`."""
    text = ""
    for token in tokens:
        body, guess = (escape(str(token.get(name, ""))).lstrip(WORD_MARK) for name in ("token", "guess"))
        if "probability" in token:  # a mark without a word is shown as such
            body, share = f"<del>{body or WORD_MARK}</del>", f"<small>{token['probability']:.0%}</small>"
            body = f"<u>{body} {guess or WORD_MARK} {share}</u>"
        space = " " if token["token"].startswith(WORD_MARK) else ""
        text += f"{space}<span style='--p:{token.get('replaced', 0)}'>{body}</span>"
    return text


def format_events(run: RunRecord) -> str:
    """Return resumes, spikes and skipped updates, the last ones of many."""
    events = run.list_events()
    rows = ((step, escape(text)) for step, text in events[-EVENTS_SHOWN:])
    table = format_table(rows) if events else "<p class=soft>No stop, no spike, no skipped update.</p>"
    return f"<h2>Events</h2>{table}"


def format_recipe(runs: list[RunRecord]) -> str:
    """Return the settings other than defaults; of several runs, those that differ."""
    default = TrainConfig().to_dict()
    usual = default if len(runs) == 1 else default | runs[0].train
    names = (name for name in default if any(run.train.get(name, usual[name]) != usual[name] for run in runs))
    return f"<h2>Recipe</h2>{compare([run.train for run in runs], names)}"


def format_environment(runs: list[RunRecord]) -> str:
    """Return versions, device and command of each run."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    return f"<h2>Environment</h2>{compare([run.environment for run in runs], names)}"


def compare(values: list[dict], names: Iterable[str]) -> str:
    """Return a table with a column per run."""
    return format_table((name, *(show(of_run.get(name, "–")) for of_run in values)) for name in names)


def show(value: object) -> str:
    """Return a value as HTML, a list as its elements."""
    return escape(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def format_table(rows: Iterable[tuple]) -> str:
    """Return a table from rows of a text as their head and cells of HTML."""
    body = "".join(f"<tr><th>{show(head)}<td>{'<td>'.join(cells)}" for head, *cells in rows)
    return f"<div class='card scroll'><table>{body}</table></div>"
