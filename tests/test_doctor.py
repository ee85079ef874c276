"""`python -m DeBERTa.doctor`: each line is ok or says what to do."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version

import pytest
import torch

from tests.conftest import ROOT


def run(*before, program="", first="", **environment):
    code = f"{first}\nimport sys, DeBERTa.doctor as doctor\n{program}\nsys.exit(doctor.main())"
    result = subprocess.run(
        [*before, sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
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
    assert f"torch {version('torch')}" in found["versions"][1]  # __version__ names the build, too


@pytest.mark.parametrize("name", ["torch", "numpy", "sentencepiece", "safetensors", "tqdm"])
def test_a_missing_package(name):
    """It is named; nothing else can be checked without it."""
    found = run(first=f"import sys; sys.modules[{name!r}] = None")
    assert list(found) == ["versions"]
    assert found["versions"][1].endswith(f"install {name}: pip install -r requirements.txt")


def test_what_is_missing():
    """No cache, disk or shared memory; a mirror without a scheme, another one with its own port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}"
        program = "doctor.LITTLE_DISK = 1e9; doctor.SHARED_MEMORY = '/missing'"
        found = run(program=program, DEBERTA_CACHE="/proc/cache", HF_ENDPOINT=mirror)
        proxy = mirror.removeprefix("http://")
        other = run(HF_ENDPOINT="http://mirror.example", http_proxy=proxy, no_proxy="localhost")
    assert found["cache"][1].endswith("it cannot be written: name another directory in DEBERTA_CACHE")
    assert "make room, or give --output_dir on another disk" in found["disk"][1]
    assert found["shared memory"][1].startswith("shared memory: 0.0 MB; data workers need 1 MB for locks: ")
    assert found["network"] == ("ok", "network: 127.0.0.1")
    assert other["network"] == ("ok", "network: mirror.example by the proxy 127.0.0.1")
    found = run(HF_ENDPOINT="mirror.example", CXX="/nowhere/g++")
    assert found["kernels"][1].endswith("; set CXX to a C++ compiler, or unset it")
    assert found["network"][1].startswith("network: mirror.example; it is not a URL: write https://")


def test_no_home_directory():
    """One sentence in place of a traceback."""
    program = "import os, sys; del os.environ['HOME']; os.environ.pop('DEBERTA_CACHE', None); "
    program += "os.getuid = lambda: 54321; import DeBERTa.doctor; sys.exit(DeBERTa.doctor.main())"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "no cache directory: HOME is not set" in line


@pytest.mark.parametrize("gpus", [1, 2])
def test_little_shared_memory(gpus):
    """The 64 MB of a Docker container are enough for data workers, but not for NCCL."""
    size = "64M" if gpus > 1 else "64k"
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount")
    before = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh")
    found = run(*before, program=f"doctor.count_gpus = lambda: {gpus}")
    assert found["shared memory"][0] == "look"
    assert "--shm-size 1g" in found["shared memory"][1]
    if gpus > 1:
        assert run(*before, program="doctor.count_gpus = lambda: 1")["shared memory"][0] == "ok"


def test_a_driver_that_pytorch_cannot_use(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("PyTorch uses the GPU")
    program = f"from pathlib import Path; doctor.NVIDIA_DRIVER = Path({str(tmp_path)!r})"
    assert "PyTorch cannot use the NVIDIA driver" in run(program=program)["device"][1]


def test_an_unknown_flag():
    command = [sys.executable, "-m", "DeBERTa.doctor", "--foo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "unrecognized arguments: --foo" in result.stderr
