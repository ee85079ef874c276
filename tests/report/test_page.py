"""The page: complete, self-contained, escaped; never the end of a run."""

import json
import re
from html.parser import HTMLParser

import pytest

from DeBERTa.report.page import format_page, format_sentence, update_report, write_report
from DeBERTa.report.read import RunRecord, read_run
from tests.runs import run, tiny_flags

VOID = {"meta", "progress", "br", "path", "tr", "td", "th"}  # their end is implied, or they are empty


class Checker(HTMLParser):
    """Collects what a page loads, and checks that its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.titles.append(data.strip())


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loaded == []
    assert not re.search(r"https?:|url\(|@import|NaN|\bnan\b|\binf\b", page)
    return checker.titles


@pytest.fixture(scope="module")
def rtd(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtd")
    assert run(tiny_flags(folder, prepared))[0] == 0
    return folder / "run"


def test_a_run_writes_it(rtd):
    titles = check((rtd / "report.html").read_text())
    expected = [
        "Health",
        "Curves by step",
        "Predictions on validation text",
        "Events",
        "Recipe",
        "Environment",
    ]
    assert [title for title in titles if title in expected] == expected
    curves = {"ROC AUC", "Perplexity", "Learning rate", "Gradient norm", "Throughput", "Peak memory"}
    assert curves <= set(titles)
    assert "Other metrics" not in titles
    assert (
        "<title>discriminator recall at precision 50</title></polyline>" in (rtd / "report.html").read_text()
    )
    assert format_page([read_run(rtd)]) == (rtd / "report.html").read_text()


def test_mlm(prepared, tmp_path):
    assert run(tiny_flags(tmp_path, prepared, "MLM"))[0] == 0
    titles = check((tmp_path / "run" / "report.html").read_text())
    assert "Loss on masked tokens" in titles
    assert not any("iscriminator" in title for title in titles)


def test_comparison(rtd, tmp_path):
    other = tmp_path / "other <b>&"
    other.mkdir()
    settings = json.loads((rtd / "config.json").read_text())
    settings["train"]["learning_rate"] = 0.5
    del settings["train"]["adam_beta1"]  # a version without it
    (other / "config.json").write_text(json.dumps(settings))
    (other / "metrics.jsonl").write_text((rtd / "metrics.jsonl").read_text())
    write_report([read_run(rtd), read_run(other)], tmp_path / "comparison.html")
    page = (tmp_path / "comparison.html").read_text()
    assert {"run", "other <b>&", "Recipe"} <= set(check(page))
    assert re.findall(r"<tr><th>learning_rate<td>(\S+?)<td>(\S+?)<", page) == [("0.001", "0.5")]
    assert "<th>warmup" not in page
    assert "<th>adam_beta1" not in page


@pytest.mark.parametrize("value", [None, 0, 0.0, -1.5, 1e300, 1e-300, True, "text", [1], {}])
def test_any_value(value, tmp_path):
    names = ("loss", "perplexity", "discriminator_replaced", "discriminator_auc", "grad_norm", "new_metric")
    rows = [
        {"step": n, "kind": kind, **dict.fromkeys(names, value)} for n in (0, 5) for kind in ("train", "old")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(format_page([read_run(tmp_path)]))


def test_names_of_metrics_and_tokens_are_escaped(tmp_path):
    rows = [{"step": 1, "kind": "<script>", "<script>": 1.0}]
    check(
        format_page([RunRecord(tmp_path, {"train": {"tag": "<script>"}}, {"<script>": "<script>"}, rows, {})])
    )
    sentence = [{"token": "▁<script>", "guess": "<b>", "probability": 0.5, "replaced": 0.1}]
    assert "<script>" not in format_sentence(sentence)
    assert "<b>" not in format_sentence(sentence)


def test_old_and_new_domain_share_a_chart(tmp_path):
    rows = [{"step": n, "kind": kind, "loss": 1.0 + n} for n in (1, 2) for kind in ("valid", "old")]
    page = format_page([RunRecord(tmp_path, {}, {}, rows, {})])
    assert page.count("<polyline") == 2
    assert {"old", "valid"} == set(re.findall(r"<title>(\w+)</title></polyline>", page))


def test_a_run_outlives_a_report_that_cannot_be_written(prepared, tmp_path):
    flags = tiny_flags(tmp_path, prepared)
    assert run(flags)[0] == 0
    for name in ("report.html", "samples.jsonl"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    status, output = run(flags | {"num_training_steps": 8})  # resumes: a start would rename the samples
    assert status == 0, output
    assert "warning: no report.html: cannot write" in output
    assert not re.search("^ *report  ", output, re.MULTILINE)
    assert re.search(r"warning: cannot write \S+samples.jsonl: Is a directory", output)


def test_a_directory_without_metrics(tmp_path):
    update_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
