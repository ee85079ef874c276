"""The tables of docs/evaluation.md that are not printed by a command are those of the raw results."""

import json
from statistics import mean, stdev

import pytest

from experiments.ablations.table import format_interval
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
STUDENT = 4.3027  # of two degrees of freedom


@pytest.mark.parametrize("model", ["generator", "discriminator"])
def test_probes(model):
    """Means over three seeds ± half the 95 % interval; that of random weights has its own three seeds."""
    lines = (ROOT / "experiments" / "probe" / "quick_start.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["seed"], row["step"]) for row in rows] == [(1, 5000), (2, 5000), (3, 5000)]

    def format_column(name: str) -> str:
        return format_interval([row[f"{model}_{name}"] for row in rows])

    half = STUDENT * rows[0][f"{model}_random_tag_deviation"] / 3**0.5
    random = f"{format_column('random_tag_accuracy')} ± {half:.3f}"
    columns = ("tag_accuracy", "", "word_tag_accuracy", "pair_accuracy")
    cells = [format_column(name) if name else random for name in columns]
    assert f"\n| {model} | {' | '.join(cells)} |\n" in PAGE


def test_fine_tuning():
    """Means ± standard deviation over three seeds, and the baseline."""
    results = [
        json.loads((ROOT / "experiments" / "finetune" / f"movies_{task}.json").read_text())
        for task in ("classification", "regression")
    ]
    scores = [values for result in results for values in result["scores"].values()]
    tuned = " | ".join(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in scores)
    words = " | ".join(f"{value:.3f}" for result in results for value in result["words_only"].values())
    assert f"\n| fine-tuned | {tuned} |\n| words and pairs of words | {words} |\n" in PAGE
