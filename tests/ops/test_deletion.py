"""DeBERTa/ops is optional: everything else works without it, and `--kernels off` does not import it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa.training.checkpoint import list_steps
from tests.conftest import ROOT
from tests.runs import build_arguments, read_final_files, remove_after

WARNING = "the package DeBERTa/ops is missing: plain PyTorch is used, as with --kernels off"
KERNELS_OFF = """
import sys
from DeBERTa.train import main
status = main(sys.argv[1:])
print(sorted(name for name in sys.modules if name.startswith("DeBERTa.ops")))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Return a copy of the repository without DeBERTa/ops and its tests."""
    folder = tmp_path_factory.mktemp("copy") / "repository"
    ignored = shutil.ignore_patterns("ops", "test_triton.py", ".*", "__pycache__", "build", "output", "cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    assert not (folder / "DeBERTa" / "ops").exists()
    return folder


def run(root: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command on the repository in `root`, with this Python first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(root), "PATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*map(str, arguments)],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def list_flags(run_dir: Path, prepared: Path, kernels: str) -> list[str]:
    """Return flags of four steps of a tiny preset, with a checkpoint after each two."""
    values = {
        "preset": "deberta-v3-tiny",
        "data_dir": prepared,
        "vocab_path": prepared / "spm.model",
        "vocab_size": 2008,
        "max_seq_length": 64,
        "output_dir": run_dir,
        "num_training_steps": 4,
        "dump_interval": 2,
        "train_batch_size": 4,
        "workers": 0,
        "precision": "fp32",
        "kernels": kernels,
    }
    return build_arguments(values)


def test_training_and_resuming_without_the_package(copy, prepared, tmp_path):
    """The copy warns once, and computes what `--kernels off` does in the full repository."""
    expected, actual = tmp_path / "full", tmp_path / "copy"
    full = run(ROOT, sys.executable, "-c", KERNELS_OFF, *list_flags(expected, prepared, "off"))
    assert full.returncode == 0, full.stderr
    assert full.stdout.splitlines()[-1] == "[]", "--kernels off imported DeBERTa/ops"
    for _ in range(2):  # the second run resumes from step 2
        result = run(copy, sys.executable, "-m", "DeBERTa.train", *list_flags(actual, prepared, "auto"))
        assert result.returncode == 0, result.stderr
        assert (result.stdout + result.stderr).count(WARNING) == 1
        assert read_final_files(actual) == read_final_files(expected)
        remove_after(actual, 2)
    assert "step 2" in result.stderr + result.stdout


def test_quick_start_without_the_package(copy, tmp_path):
    """The script prepares the bundled sample and trains.

    The vocabulary is given: training one would take most of the time.
    """
    flags = {
        "vocab_path": "tests/golden/prepare/spm.model",
        "vocab_size": 2008,
        "output_dir": tmp_path / "run",
        "num_training_steps": 2,
        "warmup": 1,
        "train_batch_size": 4,
    }
    cache = str(tmp_path / "cache")
    result = run(
        copy, "./rtd.sh", "deberta-v3-tiny", *build_arguments(flags), DATA="sample", DEBERTA_CACHE=cache
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count(WARNING) == 1
    assert list_steps(tmp_path / "run") == [2]


def test_other_tests_run_without_the_package(copy):
    """All test modules are imported; two of the model pass, and report what is missing."""
    result = run(copy, sys.executable, "-m", "pytest", "-q", "--collect-only")
    assert result.returncode == 0, result.stdout
    files = ("tests/model/test_golden.py", "tests/model/test_sharing.py")
    result = run(copy, sys.executable, "-m", "pytest", "-q", "-rs", *files)
    assert result.returncode == 0, result.stdout
    assert "the package DeBERTa/ops is missing" in result.stdout
