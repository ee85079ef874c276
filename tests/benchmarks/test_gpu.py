"""A dry run of benchmarks/gpu.sh on a CPU."""

import json
import subprocess
import sys
import tarfile

import pytest
import torch

pytest.importorskip("transformers", reason="the package transformers is not installed")
pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")

from benchmarks import gpu
from tests.conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, run benchmarks/gpu.sh itself")
def test_dry_run(tmp_path):
    """All parts at toy sizes: each leaves its result, an archive is written, the table comes last."""
    out = tmp_path / "out"
    process = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(out), "--toy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{sys.exec_prefix}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    results = json.loads((out / "results.json").read_text())["parts"]
    assert {part: result["status"] for part, result in results.items()} == dict.fromkeys(results, 0)
    expected = {"statuses": [0, 0, 0], "twice_same_bits": True, "resumed_same_bits": True}
    assert results["runs"]["eager"] == expected
    assert results["correctness"]["passed"]
    assert "SKIPPED" in (out / "correctness.log").read_text()  # there is no GPU
    for name in ("sdpa", "eager"):
        layer = results["attention"]
        assert 0 < layer[f"{name}, forward"] < layer[f"{name}, forward and backward"]
    assert [case["who"] for case in results["steps"]["cases"]] == ["ours", "composed"]
    assert all(case["tokens_per_second"] > 0 for case in results["steps"]["cases"])
    last = process.stdout.splitlines()[-1]
    assert last.startswith("rtd_tiny.json")
    assert "composed" in last
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        names = archive.getnames()
    assert {"out/results.json", "out/profile.txt", "out/runs/eager-1/metrics.jsonl"} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, run benchmarks/gpu.sh itself")
def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    """Nor does a folder that is there already, if it is empty."""
    monkeypatch.setitem(gpu.PARTS, "nothing", 60)  # which its process does not know
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu", str(out), "--toy", "--parts", "nothing", "attention"])
    gpu.main()
    results = json.loads((out / "results.json").read_text())["parts"]
    assert {part: result["status"] for part, result in results.items()} == {"nothing": 2, "attention": 0}
    assert "invalid choice" in (out / "nothing.log").read_text()
    with pytest.raises(SystemExit):
        gpu.main()
    assert "is not empty" in capsys.readouterr().err
