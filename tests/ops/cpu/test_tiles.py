"""The kernels on AMX tiles, on any processor with bfloat16: tiles are emulated in software.

Few processors have tiles, so that faults of these kernels, and of what calls them, were seen there only.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEADER = Path(__file__).parent / "emulated_tiles.h"
TESTS = ["test_attention.py", "test_linear.py", "test_losses.py"]


@pytest.mark.usefixtures("kernels")
def test_kernels_on_emulated_tiles():
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no instructions for bfloat16")
    compiler = f"{os.environ.get('CXX') or 'g++'} -include {shlex.quote(str(HEADER))}"
    code = "import pytest, sys; from DeBERTa.ops.cpu import library; assert library.has_tiles(); "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    files = [str(HEADER.with_name(name)) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-c", code, "-x", *files],
        cwd=ROOT, env=os.environ | {"CXX": compiler}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
