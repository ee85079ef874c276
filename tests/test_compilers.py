"""What torch.compile and Triton need on a machine, and what is missing."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from DeBERTa.compilers import find_compiler_obstacle, set_compiler_caches

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Imitate a GPU machine with all that is needed, and return the folder of its commands."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "triton.py").touch()
    (tmp_path / "gcc").touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 0))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.mark.usefixtures("machine")
def test_a_complete_machine():
    assert find_compiler_obstacle(CUDA) is None


def test_another_c_compiler(machine, monkeypatch):
    (machine / "gcc").rename(machine / "clang")
    assert find_compiler_obstacle(CUDA) is None
    monkeypatch.setenv("CC", "icx")
    assert find_compiler_obstacle(CUDA) == "Triton needs a C compiler (icx); install it, or name one in CC"
    (machine / "icx").touch(0o755)
    assert find_compiler_obstacle(CUDA) is None


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("packages/triton.py", "the package triton is not installed; install it"),
        ("gcc", "Triton needs a C compiler (gcc or clang); install it, or name one in CC"),
        ("Python.h", "Triton needs the headers of Python; install them (python3-dev)"),
    ],
)
def test_what_is_missing(machine, missing, expected):
    (machine / missing).unlink()
    assert find_compiler_obstacle(CUDA) == expected


@pytest.mark.usefixtures("machine")
def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (6, 1))
    expected = "Triton compiles for GPUs of compute capability 7.0 and newer"
    assert find_compiler_obstacle(CUDA) == expected


def test_the_compiler_for_a_cpu(machine, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    name = "clang++" if sys.platform == "darwin" else "g++"
    complaint = "there is no C++ compiler {}; install it, or name one in CXX"
    assert find_compiler_obstacle(CPU) == complaint.format(name)
    (machine / name).touch(0o755)
    assert find_compiler_obstacle(CPU) is None
    monkeypatch.setenv("CXX", "none")
    assert find_compiler_obstacle(CPU) == complaint.format("none")


def test_headers_of_this_python():
    """What the check looks for is where a Python that can compile has it."""
    includes = Path(sysconfig.get_path("include"))
    if not includes.is_dir():
        pytest.skip("the headers of this Python are not installed")
    assert (includes / "Python.h").is_file()


def test_caches(monkeypatch, tmp_path):
    """Where the environment names none, they depend on neither the home nor the name of the user."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", "/")
    set_compiler_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(f"/torchinductor_{os.getuid()}")
    monkeypatch.setenv("TRITON_CACHE_DIR", "given")
    set_compiler_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "given"
