"""The messages for packages that are missing and for a Python that is too old."""

import venv
from pathlib import Path

import pytest

from tests.test_misuse import fail


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Return the bin directory of an environment without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin"


@pytest.mark.parametrize("command", ["python -m DeBERTa.train --help", "python prepare_data.py --help"])
def test_python_without_packages(command, bare):
    message = fail(command, bare, PYTHONPATH="")
    assert "lacks torch, numpy, sentencepiece, safetensors, tqdm: activate a Python that has them" in message


@pytest.mark.parametrize("command", ["python -m DeBERTa.train --help", "python prepare_data.py --help"])
def test_python_that_is_too_old(command, tmp_path):
    """It is this Python with another version, which it sets when it starts."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 9, 0)\n")
    assert fail(command, PYTHONPATH=str(tmp_path)) == "Python 3.9 is too old: use 3.10 or newer"
