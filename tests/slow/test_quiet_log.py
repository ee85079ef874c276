"""A run whose --log_interval is long still writes a line at least every minute."""

import os
import signal
import time

from tests.runs import ForkedRun, tiny_flags

LONG = {"num_training_steps": 1_000_000, "dump_interval": 1_000_000, "log_interval": 1_000_000}


def test_a_line_every_minute(tmp_path, prepared):
    process = ForkedRun(tiny_flags(tmp_path, prepared) | LONG, live=True)
    process.wait_for("step 1/")
    started = time.monotonic()
    process.wait_for("/1000000 is done")
    assert time.monotonic() - started < 75
    os.kill(process.pid, signal.SIGTERM)
    assert process.finish()[0] == 143
