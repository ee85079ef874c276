"""A dry run of benchmarks/gpu.sh on a CPU."""

import json
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch

pytest.importorskip("transformers", reason="the package transformers is not installed")
pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")

from benchmarks import gpu
from tests.conftest import ROOT
from tests.processes import is_running, list_children


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
    counts = results["correctness"]
    assert (counts["passed"], counts["failed"], counts["pytest_status"]) == (0, 0, 0)
    assert counts["skipped"] > 40
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


def wait_for_end(process: int) -> None:
    """Wait until a process that was killed is gone."""
    deadline = time.monotonic() + 10
    while is_running(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("ending", ["kill", "limit"])
def test_a_part_leaves_no_process(tmp_path, monkeypatch, ending):
    """They would take time from the next part."""
    script = f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/pid\n"
    (tmp_path / "python").write_text(script + {"kill": "kill -9 $$", "limit": "wait"}[ending])
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(gpu.PARTS, "attention", 2)
    status = gpu.run_part("attention", tmp_path, is_toy=False)["status"]
    assert status == {"kill": -9, "limit": "out of time"}[ending]
    wait_for_end(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, run benchmarks/gpu.sh itself")
def test_a_stopped_script_leaves_what_there_is(tmp_path):
    """The archive and the table of the parts that are done, and no process."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--toy", "--parts", "attention", "runs"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        parts: list[int] = []
        while not parts:
            assert process.poll() is None
            time.sleep(0.1)
            parts = list_children(process.pid) if (out / "runs.log").exists() else []
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    for part in parts:
        wait_for_end(part)
    assert "attention (" in output
    assert '"status": "stopped"' in output
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/results.json", "out/attention.log"} <= set(archive.getnames())


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
