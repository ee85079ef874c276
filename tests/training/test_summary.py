"""The summary at the end of a run: what it names exists, and its next command works."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs import run, tiny_flags


@pytest.mark.parametrize(("task", "module"), [("RTD", "detect"), ("MLM", "fill_mask")])
def test_summary(tmp_path, prepared, task, module):
    run_dir = tmp_path / "a run"  # the command that is named next is quoted
    status, output = run(tiny_flags(tmp_path, prepared, task) | {"output_dir": run_dir})
    assert status == 0, output
    rows = dict(re.findall(r"^ *([a-z ]+)  (.+)$", output, re.MULTILINE))
    assert re.fullmatch(r"6 steps in 0:00:\d\d", rows["trained"])
    step, path = re.fullmatch(r"step (\d), validation [a-z ]+ [\d.]+: (.+)", rows["best"]).groups()
    assert path == str(run_dir / "checkpoints" / f"step-{int(step):08d}")
    assert rows["report"] == str(run_dir / "report.html")
    for named in (path, rows["report"], *rows["final models"].split(", ")):
        assert (run_dir / named).exists()
    command = shlex.split(rows["next"])
    assert command[:3] == ["python", "-m", f"DeBERTa.{module}"]
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_finished_run_without_metrics(tmp_path, prepared):
    """The same command still names models and report."""
    flags = tiny_flags(tmp_path, prepared)
    assert run(flags)[0] == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    status, output = run(flags)
    assert status == 0, output
    assert "final models" in output
