"""The encoder in onnxruntime, in an environment with its packages."""

import os
import subprocess

from tests.conftest import ROOT
from tests.hub.exported import VARIANTS
from tests.slow.environments import make_environment

PACKAGES = ["onnx", "onnxscript", "onnx_ir", "onnxruntime", "ml_dtypes", "protobuf", "flatbuffers"]


def test_onnx(tmp_path):
    python = make_environment(tmp_path / "venv", alone=PACKAGES, packages=[])
    result = subprocess.run(
        [python, "-m", "pytest", "tests/hub/test_onnx.py", "-k", "test_encoder"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert f"{len(VARIANTS)} passed" in result.stdout
    assert "skipped" not in result.stdout
