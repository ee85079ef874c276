"""The Triton attention against float64, without a GPU: in the interpreter."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels are not tested: the package triton is not installed", allow_module_level=True)

# Rounding of float32 over sums of 136 to 640 products; float16 keeps 11 bits of every product and
# probability.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3}
CASES = [
    {"dtype": "float32", "p": 0.1, "terms": "c2p|p2c", "shape": [2, 2, 136, 32]},
    {"dtype": "float16", "p": 0.1, "terms": "c2p|p2c", "shape": [1, 2, 136, 64]},
    {"dtype": "float32", "p": 0.1, "terms": "c2p|p2c", "shape": [1, 1, 40, 128]},  # tiles of 32 rows
    {"dtype": "float16", "p": 0.1, "terms": "c2p", "shape": [1, 1, 72, 128]},
    {"dtype": "float32", "p": 0.1, "terms": "p2c", "shape": [9, 1, 8, 32]},
    {"dtype": "float32", "p": 0.0, "terms": "", "shape": [1, 1, 13, 32]},
    {"dtype": "float32", "p": 0.1, "terms": "c2p|p2c", "shape": [1, 1, 13, 64]},
]


@functools.cache
def run_interpreter() -> list[dict]:
    """Errors of all cases, from one process."""
    command = [sys.executable, "-m", "tests.ops.triton.cases", *map(json.dumps, CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_agrees_with_float64(number):
    """Context and all gradients, with padded keys, and the mask of the CPU's `draw_keep_mask`."""
    errors = run_interpreter()[number]
    assert errors.pop("differs between calls") == 0
    assert max(errors.values()) < TOLERANCE[CASES[number]["dtype"]], errors
