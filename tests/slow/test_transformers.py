"""Exported directories opened with transformers 4, in an environment of its own: it excludes version 5."""

import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.hub.exported import VARIANTS, open_with_transformers, write_all
from tests.hub.test_transformers import check_predictions, check_tokenizer, check_variant

VERSION = "4.57.6"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Install transformers 4 in front of this Python's other packages, and open all directories with it."""
    folder = tmp_path_factory.mktemp("exported")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    needed = ["huggingface_hub<1", "tokenizers<0.23", "requests", "pyyaml", "regex", "packaging", "filelock"]
    subprocess.run([*install, "--no-deps", f"transformers=={VERSION}"], check=True)
    subprocess.run([*install, *needed], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    write_all(folder)
    return open_with_transformers(folder, str(python))


def test_version(results):
    assert results["version"] == VERSION


@pytest.mark.parametrize("variant", VARIANTS)
def test_models(results, variant):
    check_variant(results["variants"][variant])


def test_tokenizer(results):
    check_tokenizer(results["tokenizer"])


def test_predictions(results):
    check_predictions(results["predictions"])
