"""How the kernels are built, and what happens where they cannot be; their numbers are tested with what calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa.model import kernels

DROPOUT = """
import sys, torch
from DeBERTa.model import kernels
from DeBERTa.model.dropout import Dropout
torch.manual_seed(0)
torch.save(Dropout(0.1)(torch.ones(1000)), sys.argv[1])
print(kernels.obstacle())
"""


def run(folder: Path, **environment: str) -> tuple[str, torch.Tensor]:
    """What keeps the kernels from being used in a new process, and dropout of ones there."""
    folder.mkdir(exist_ok=True)
    env = os.environ | {"DEBERTA_CACHE": str(folder / "cache")} | environment
    command = [sys.executable, "-c", DROPOUT, str(folder / "out.pt")]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return process.stdout.strip(), torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    torch.manual_seed(0)
    return kernels_off()


def kernels_off() -> torch.Tensor:
    from DeBERTa.model.dropout import Dropout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "find", lambda *_: None)
        return Dropout(0.1)(torch.ones(1000))


def test_compiled_once(tmp_path, expected):
    obstacle, out = run(tmp_path)
    assert obstacle == "None" and torch.equal(out, expected)
    (library,) = (tmp_path / "cache" / "kernels").iterdir()
    written = library.stat().st_mtime_ns
    assert run(tmp_path)[0] == "None"
    assert list((tmp_path / "cache" / "kernels").iterdir()) == [library] and library.stat().st_mtime_ns == written


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C++ compiler /nowhere/g++"),
        ("[ $1 = --version ] || { echo 'kernels.cpp: something is wrong' >&2; exit 1; }", "something is wrong"),
        ("[ $1 = --version ] || { for last; do :; done; echo rubbish > $last; }", "cannot be used"),
    ],
)
def test_without_a_compiler(tmp_path, compiler, reason, expected):
    """A reason in one line, the same masks, and nothing left behind."""
    chosen = "/nowhere/g++" if compiler is None else script(tmp_path, compiler)
    obstacle, out = run(tmp_path / "run", CXX=chosen)
    assert reason in obstacle and "\n" not in obstacle
    assert torch.equal(out, expected)
    assert not list((tmp_path / "run").glob("cache/kernels/*"))


def test_home_that_cannot_be_written_to(tmp_path, expected):
    """Compiled for this process alone."""
    (tmp_path / "file").touch()
    obstacle, out = run(tmp_path, DEBERTA_CACHE=str(tmp_path / "file"))
    assert obstacle == "None" and torch.equal(out, expected)


def test_exponentials():
    """Of bfloat16 and float32 logits, against float64: to 3 units of the last place, and 0 where float32 has none."""
    logits = torch.linspace(-100, 0, 100_001).view(1, -1)
    largest, sums = torch.empty(1), torch.empty(1, 100_001)
    kernels.find("chunk_sums", logits)(logits, largest, sums, 1, 100_001, 100_001)
    exact = logits.double().exp()
    assert largest == 0
    torch.testing.assert_close(sums.double(), torch.where(logits < -87, 0.0, exact), rtol=3 * 2**-23, atol=0)
    logits[0, 7] = float("nan")
    kernels.find("chunk_sums", logits)(logits, largest, sums, 1, 100_001, 100_001)
    assert sums[0, 7].isnan() and sums.isnan().sum() == 1
