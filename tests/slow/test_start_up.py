"""benchmarks/start_up.py with a small text."""

import json
import subprocess
import sys

from tests.conftest import ROOT


def test_a_small_text(tmp_path):
    command = [sys.executable, "benchmarks/start_up.py", "--tokens", "51000", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "result.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    (text,) = json.loads((tmp_path / "result.json").read_text())["texts"]
    parts = [text["later"][name] for name in ("imports", "ids", "model", "batch")]
    assert min(parts) > 0
    assert sum(parts) + text["later"]["step"] < 2 * text["later"]["command"]
