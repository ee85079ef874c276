"""`python -m DeBERTa.report` as people run it."""

import csv
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, strip_times

ROWS = [{"step": step, "kind": kind, "loss": 1 / step} for step in (1, 2) for kind in ("train", "valid")]


def report(*arguments, before=""):
    program = f"{before}\nimport sys\nfrom DeBERTa.report.__main__ import main\nsys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, strip_times(result.stderr)


@pytest.fixture
def runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "a", tmp_path / "b"


def test_one_run_and_several(runs, tmp_path):
    assert report(runs[0]) == (0, f"wrote {runs[0]}/report.html\n")
    table, page = tmp_path / "table.csv", tmp_path / "page.html"
    assert report(*runs, "--html", page, "--csv", table) == (0, f"wrote {page}\n")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["a"] * 4 + ["b"] * 4
    assert rows[-1] == {"run": "b", "step": "2", "kind": "valid", "loss": "0.5"}


def test_png(runs, tmp_path):
    pytest.importorskip("matplotlib")
    assert report(*runs, "--html", tmp_path / "page.html", "--png", tmp_path / "charts.png")[0] == 0
    assert (tmp_path / "charts.png").read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib(runs, tmp_path):
    status, output = report(
        runs[0], "--png", tmp_path / "c.png", before="import sys; sys.modules['matplotlib'] = None"
    )
    assert status == 1
    assert output == "error: --png: the package matplotlib is missing; pip install matplotlib\n"


def test_errors(tmp_path):
    status, output = report(tmp_path)
    assert status == 1
    assert (
        output == f"error: {tmp_path}: there is no metrics.jsonl with metrics; give the directory of a run\n"
    )
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]))
    status, output = report(tmp_path, "--html", "/proc/report.html")
    assert status == 1
    assert output.startswith("error: cannot write /proc/report.html")


def test_it_does_not_load_torch(runs):
    assert report(runs[0], before="import sys; sys.modules['torch'] = None")[0] == 0
