"""A built wheel, used outside the checkout: presets, model configs, sample and console commands."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import DeBERTa
from tests.conftest import GOLDEN, ROOT

CONFIGS = sorted(path.name for path in (ROOT / "experiments" / "language_model").glob("*.json"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the sources, with the setuptools of this Python."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("DeBERTa", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*build, "./source"], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the bin directory of an environment with the wheel, and the other packages of this Python."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
    ]
    subprocess.run([*install, "--no-index", wheel], check=True, capture_output=True)
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return folder / "bin"


def run(installed: Path, cwd: Path, command: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a console command in `cwd`, without the checkout on any path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"DEBERTA_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [installed / command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_the_wheel_holds(wheel):
    """All code and data once; nothing of tests, benchmarks or docs."""
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"DeBERTa", f"deberta_pretraining-{DeBERTa.__version__}.dist-info"}
    for name in CONFIGS:
        assert f"DeBERTa/experiments/language_model/{name}" in names
    assert "DeBERTa/experiments/sample/state_of_the_union.txt.xz" in names
    assert "DeBERTa/experiments/probe/brown.txt.xz" in names
    sources = [path for pattern in ("*.py", "*.cpp", "*.h") for path in (ROOT / "DeBERTa").rglob(pattern)]
    assert {str(path.relative_to(ROOT)) for path in sources} <= set(names)


def test_metadata(wheel):
    """torch from 2.11; requirements.txt pins a version of every package, within the range."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    text = archive.read(metadata).decode()
    assert f"Version: {DeBERTa.__version__}\n" in text
    assert re.search(r"Requires-Dist: torch(<3,>=2\.11|>=2\.11,<3)\n", text)
    for file, pattern in (
        ("requirements.txt", r"Requires-Dist: (\w+)[^;\n]*\n"),
        ("requirements-hub.txt", r'Requires-Dist: (\w+)[^;\n]*; extra == "hub"\n'),
    ):
        pinned = set(re.findall(r"^(\w+)==", (ROOT / file).read_text(), re.MULTILINE))
        assert set(re.findall(pattern, text)) == pinned
    for minor in range(10, 14):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}\n" in text
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {DeBERTa.__version__}\n" in citation


def test_console_commands_outside_the_checkout(installed, tmp_path):
    """Help, version, and one step of a preset on the bundled sample with a shipped model config."""
    for command in ("deberta-train", "deberta-prepare"):
        result = run(installed, tmp_path, command, "--help")
        assert result.returncode == 0, result.stderr
        assert "--preset" in result.stdout
    result = run(installed, tmp_path, "deberta-train", "--version")
    assert result.returncode == 0
    assert DeBERTa.__version__ in result.stdout
    result = run(installed, tmp_path, "deberta-train", "--preset", "bert-tini")
    assert result.returncode == 2
    assert "bert-tiny" in result.stderr

    vocabulary = tmp_path / "spm.model"
    vocabulary.write_bytes((GOLDEN / "prepare" / "spm.model").read_bytes())
    preset = ["--preset", "bert-tiny", "--vocab_path", "spm.model", "--vocab_size", 2008, "--kernels", "off"]
    preset += ["--num_training_steps", 1, "--train_batch_size", 2, "--warmup", 0, "--workers", 0, "--seed", 1]
    result = run(installed, tmp_path, "deberta-prepare", *preset)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "cache" / "sample").glob("32-*/*.txt"))) == 3
    result = run(installed, tmp_path, "deberta-train", *preset)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output" / "bert-tiny" / "model" / "model.safetensors").is_file()
