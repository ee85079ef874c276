"""`python -m DeBERTa.report` as people run it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa.presets import PRESETS
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


def test_runs_of_the_same_name(runs, tmp_path):
    """They have their paths in place of it."""
    other = shutil.copytree(runs[0], tmp_path / "other" / "a")
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    assert report(runs[0], other, "--html", page, "--csv", table)[0] == 0
    with table.open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [str(runs[0])] * 4 + [str(other)] * 4
    assert f"{other}: " in page.read_text()


def test_a_reference_without_a_common_step(runs):
    """It is named: silence would read as agreement."""
    settings = {"train": {"tag": "deberta-v3-tiny", **PRESETS["deberta-v3-tiny"].flags}}
    (runs[0] / "config.json").write_text(json.dumps(settings))
    assert "a: note: the reference has no evaluation at a step" in report(runs[0], "--reference")[1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", {"train": None}),
        ("samples.jsonl", {"step": 2, "sentences": [[{"guess": "a"}]]}),
        ("metrics.jsonl", {"step": 2, "kind": "valid", "loss": 10**400}),
    ],
)
def test_values_of_other_types(name, line, runs):
    with (runs[0] / name).open("a") as file:
        file.write(json.dumps(line) + "\n")
    status, error = report(runs[0])
    assert status == 1
    assert error.startswith(
        f"error: {runs[0]}: a file of the run was changed, a value in it is not what a run"
    )
    assert error.count("\n") == 1


def test_a_name_that_is_no_text(runs, tmp_path):
    """The page and the table have a replacement for the byte that is not UTF-8."""
    named = runs[0].rename(os.fsdecode(bytes(tmp_path) + b"/run\xff"))
    assert report(named, "--csv", tmp_path / "table.csv")[0] == 0
    assert "<title>run?</title>" in (named / "report.html").read_text()
    assert (tmp_path / "table.csv").read_text().splitlines()[1].startswith("run?,")


def test_where_the_page_cannot_go(runs, tmp_path):
    """A device is not replaced by a file, and a link to a file stays."""
    reason = "not a regular file; remove what is in the way, or give another path"
    assert report(runs[0], "--html", "/dev/full") == (1, f"error: cannot write /dev/full: {reason}\n")
    assert Path("/dev/full").is_char_device()
    status, output = report(runs[0], "--csv", "/dev/full")
    assert status == 1
    assert output == (
        "error: cannot write /dev/full: No space left on device; choose a directory that can be written\n"
    )
    (tmp_path / "page.html").touch()
    (tmp_path / "link").symlink_to("page.html")
    assert report(runs[0], "--html", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page.html").stat().st_size


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
    reason = "No such file or directory; choose a directory that can be written"
    assert output == f"error: cannot write /proc/report.html: {reason}\n"


def test_it_does_not_load_torch(runs):
    assert report(runs[0], before="import sys; sys.modules['torch'] = None")[0] == 0


@pytest.mark.parametrize("flag", ["--html", "--csv", "--png"])
def test_files_of_the_run_are_not_replaced(runs, flag):
    before = (runs[0] / "metrics.jsonl").read_bytes()
    status, output = report(*runs, flag, runs[0] / "metrics.jsonl")
    assert status == 1
    assert "metrics.jsonl: it is a file of the run; give another name" in output
    assert (runs[0] / "metrics.jsonl").read_bytes() == before
