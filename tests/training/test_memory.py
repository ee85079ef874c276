"""Memory limits of control groups, which may be absent."""

import subprocess
import sys

import pytest

from DeBERTa.training.memory import read_memory_limits
from tests.conftest import ROOT

# In a process of its own: the configuration of the heap lasts as long as the process.
CODE = """
from DeBERTa.training import memory
memory.read_memory_limits = lambda: {}
memory.keep_freed_memory()
"""


def test_limits_are_bytes():
    assert all(limit > 0 for limit in read_memory_limits())


@pytest.mark.parametrize("limits", [[], [1 << 30]])
def test_any_number_of_limits(limits):
    subprocess.run([sys.executable, "-c", CODE.format(limits)], cwd=ROOT, check=True)
