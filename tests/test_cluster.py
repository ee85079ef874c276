"""experiments/cluster: syntax, paths, and the variables that each example gives to the training command.

Docker, Kubernetes and SkyPilot are not run; tests/slow/test_slurm.py runs the lines of the Slurm example.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from DeBERTa.flags import parse_flags
from tests.conftest import ROOT

CLUSTER = ROOT / "experiments" / "cluster"
yaml = pytest.importorskip("yaml", reason="the package pyyaml is not installed")


def run_with_stub(script: str, folder: Path, **environment: str) -> list[str]:
    """Run a script where rtd.sh prints its variables and flags instead of training; return its words."""
    stub = folder / "rtd.sh"
    stub.write_text('#!/bin/bash\necho "$WORLD_SIZE $RANK $MASTER_ADDR $MASTER_PORT" "$@"\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def assert_trains(words: list[str], *variables: str) -> None:
    """Require these variables, and flags that the training command reads."""
    assert words[:4] == list(variables)
    assert parse_flags(["--preset", *words[4:]]).task_name == "RTD"


@pytest.mark.parametrize("name", ["install.sh", "slurm.sh"])
def test_scripts_have_no_syntax_error(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


def test_slurm_is_the_documented_script():
    """Its lines after the first are those that tests/slow/test_slurm.py takes from the page."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    documented = re.search(r"^### Slurm$.*?```bash\n#!/bin/bash\n(.*?)```", page, re.MULTILINE | re.DOTALL)[1]
    assert (CLUSTER / "slurm.sh").read_text(encoding="utf-8").endswith(documented)


def test_dockerfile():
    """What it copies exists; the build is one script; shared memory is given where the image is run."""
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    instructions = {line[0] for line in lines}
    assert instructions == {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    for _, *sources, _ in (line for line in lines if line[0] == "COPY"):
        assert all((ROOT / source).exists() for source in sources)
    (run,) = (line[1:] for line in lines if line[0] == "RUN")
    assert run[0] == "bash"
    assert (ROOT / run[1]).exists()
    assert "--shm-size" in text


def test_kubernetes(tmp_path):
    text = (CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8")
    documents = {item["kind"]: item for item in yaml.safe_load_all(text)}
    assert documents.keys() == {"Service", "PersistentVolumeClaim", "Job"}
    job, service = documents["Job"]["spec"], documents["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {item["name"]: item["value"] for item in container["env"]}
    assert job["completions"] == job["parallelism"] == int(variables["WORLD_SIZE"])
    name = documents["Job"]["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claim = mounts["/data"]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["command"] == ["bash", "-c"]
    words = run_with_stub(container["args"][0], tmp_path, JOB_COMPLETION_INDEX="1", **variables)
    assert_trains(words, "2", "1", "deberta-0.deberta", "29500")
    assert words[-1].startswith("/data/")


def test_skypilot(tmp_path):
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    files = re.findall(r"-r (\S+)", task["setup"])
    assert all((ROOT / file).exists() for file in files)
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    assert_trains(run_with_stub(task["run"], tmp_path, **given), "2", "1", "10.0.0.1", "29500")
