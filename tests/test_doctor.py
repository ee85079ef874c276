"""`python -m DeBERTa.doctor`: each line is ok or says what to do."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


def run(*before, program="", **environment):
    code = f"import sys, DeBERTa.doctor as doctor\n{program}\nsys.exit(doctor.main())"
    result = subprocess.run(
        [*before, sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert all(len(line) == 2 and line[0] in ("ok", "look") for line in lines)
    assert result.returncode == any(level == "look" for level, _ in lines)
    return {text.partition(":")[0]: (level, text) for level, text in lines}


def test_this_machine():
    found = run()
    assert list(found) == [
        "versions",
        "device",
        "kernels",
        "shared memory",
        "cache",
        "disk",
        "network",
    ]
    assert found["versions"][0] == found["device"][0] == found["cache"][0] == "ok"
    assert f"torch {torch.__version__}" in found["versions"][1]


def test_what_is_missing():
    program = "doctor.PACKAGES += ('no_such_package',); doctor.LITTLE_DISK = 1e9"
    found = run(program=program, DEBERTA_CACHE="/proc/cache")
    assert "device" not in found
    assert found["versions"][1].endswith("install no_such_package: pip install -r requirements.txt")
    assert found["cache"][1].endswith("it cannot be written: name another directory in DEBERTA_CACHE")
    assert "make room, or give --output_dir on another disk" in found["disk"][1]


def test_little_shared_memory():
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount")
    found = run("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh")
    assert found["shared memory"][0] == "look"
    assert "--shm-size 1g, or train with --workers 0" in found["shared memory"][1]


def test_a_driver_that_pytorch_cannot_use(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("PyTorch uses the GPU")
    program = f"from pathlib import Path; doctor.NVIDIA_DRIVER = Path({str(tmp_path)!r})"
    assert "PyTorch cannot use the NVIDIA driver" in run(program=program)["device"][1]
