"""The parent-death handler, as real processes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CHILD = """
import os, signal, sys
from DeBERTa.processes import exit_with_parent
exit_with_parent(signal.SIGTERM, int(sys.argv[1]))
print("running", flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_a_process_whose_parent_ended_before_ends_too():
    """As its parent it expects one that is not: the state after the parent's end."""
    start = [sys.executable, "-c", CHILD]
    ended = subprocess.run([*start, "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
    with subprocess.Popen([*start, str(os.getpid())], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "running\n"
        child.kill()
