"""What torch.compile and Triton need on a machine, and what is missing."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import pytest
import torch

from DeBERTa.compilers import find_compiler_obstacle, find_python_header, set_compiler_caches

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
    expected = "Triton needs a C compiler, and there is no icx; install it, or name one in CC"
    assert find_compiler_obstacle(CUDA) == expected
    (machine / "icx").touch(0o755)
    assert find_compiler_obstacle(CUDA) is None


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("packages/triton.py", "the package triton is not installed; install it"),
        ("gcc", "Triton needs a C compiler, and there is no gcc or clang; install it, or name one in CC"),
        ("Python.h", "Triton needs the headers of Python; install them (python3-dev)"),
    ],
)
def test_what_is_missing(machine, missing, expected):
    (machine / missing).unlink()
    assert find_compiler_obstacle(CUDA) == expected


@pytest.mark.usefixtures("machine")
def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (6, 1))
    expected = "Triton compiles for GPUs of compute capability 7.0 and newer; use a newer GPU"
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


def test_the_header_of_python(tmp_path, monkeypatch):
    """It is found where a C compiler finds it, also by the compiler's own variables."""
    source = tmp_path / "module.c"
    source.write_text("#include <Python.h>\n")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler:
        command = [compiler, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", source]
        is_found = subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
        assert (find_python_header() is not None) == is_found
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.delenv("CPATH", raising=False)
    assert find_python_header() is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Python.h").touch()
    monkeypatch.chdir(tmp_path / "other")
    assert find_python_header() is None
    for name in ("CPATH", "C_INCLUDE_PATH"):
        with monkeypatch.context() as patch:
            patch.setenv(name, f"/none:{tmp_path / 'other'}")
            assert find_python_header() == tmp_path / "other" / "Python.h"


@pytest.mark.parametrize("home", ["/none", None])
def test_a_user_without_a_home(monkeypatch, home):
    """Nor a name: Triton gets a directory for its cache, and torch.compile a name for its own."""
    for name in ("TRITON_CACHE_DIR", "USER", "HOME"):
        monkeypatch.setenv(name, home or "")  # so that it is restored
        if not home or name != "HOME":
            monkeypatch.delenv(name)
    if home is None:  # nor an entry in /etc/passwd
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    set_compiler_caches()
    assert os.environ["USER"] == str(os.getuid())
    assert os.environ["TRITON_CACHE_DIR"] == f"{tempfile.gettempdir()}/triton_{os.getuid()}"
    monkeypatch.setenv("TRITON_CACHE_DIR", "given")
    set_compiler_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "given"


def test_a_user_with_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "name")
    set_compiler_caches()
    assert "TRITON_CACHE_DIR" not in os.environ
    assert os.environ["USER"] == "name"
