"""Memory limits of control groups, which may be absent, and errors when memory runs out."""

import errno
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from DeBERTa.errors import MemoryLimitError
from DeBERTa.memory import (
    check_size,
    read_available_memory,
    read_memory_limits,
    translate_memory_errors,
)
from tests.conftest import ROOT, strip_times, tiny_model
from tests.runs import PATIENCE, build_arguments, run, tiny_flags

# In a process of its own: the configuration of the heap lasts as long as the process.
CODE = """
from DeBERTa import memory
memory.read_memory_limits = lambda: {}
memory.keep_freed_memory()
"""


@pytest.mark.parametrize(
    ("limit", "is_translated"),
    [
        (MemoryError("Unable to allocate 3 GiB for an array"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[1099511627776, 9]"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_errors_of_memory_are_one_sentence(limit, is_translated):
    with (
        pytest.raises(MemoryLimitError if is_translated else type(limit)) as error,
        translate_memory_errors(),
    ):
        raise limit
    if is_translated:
        assert str(error.value).startswith("out of memory")


def test_a_limit_of_threads_is_one_sentence():
    with (
        pytest.raises(MemoryLimitError, match=r"no thread can be started: .*ulimit -v"),
        translate_memory_errors(),
    ):
        raise RuntimeError("can't start new thread")


BATCH = ("micro-batches are too", "--accumulative_update", "--train_batch_size", "--gradient_checkpointing")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_batch_size": 40_000, "workers": 1}, BATCH),
        ({"vocab_size": 100_000_000}, ("the model is too large", "--model_config", "--vocab_size")),
    ],
)
def test_what_does_not_fit_a_limit(tmp_path, prepared, change, named):
    """A real limit of the process, as of a batch system."""
    flags = tiny_flags(tmp_path, prepared) | change
    line = shlex.join([sys.executable, "-m", "DeBERTa.train", *build_arguments(flags)])
    script = f"ulimit -v 4000000; exec {line}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = strip_times(done.stderr).splitlines()[-1]
    assert last.startswith("error: out of memory ("), done.stderr
    assert [part for part in named if part not in last] == []


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must be at least 1 and at most 1000, not 1000000000",
        ),
        ({"intermediate_size": 2**30}, "out of memory (the weights with gradients and moments: 2,"),
        ({"position_buckets": 2**31 - 1}, "out of memory (the weights with gradients and moments: 2,"),
        ({"hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 1}, "out of memory: the model is too large"),
    ],
)
def test_a_model_that_is_too_large(tmp_path, prepared, sizes, named):
    """It is found before any memory is taken."""
    flags = tiny_flags(tmp_path, prepared, "MLM")
    flags["model_config"].write_text(json.dumps(tiny_model() | sizes))
    status, output = run(flags)
    assert status == 1
    assert f": {named}" in output


def test_a_batch_that_is_too_large(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"train_batch_size": 2**31 - 1}
    status, output = run(flags)
    assert status == 1
    message = output.splitlines()[-1]
    assert message.startswith("error: out of memory (a batch of one rank: 5,635.0 GB, available: ")
    assert message.endswith("): give a smaller --train_batch_size")


def test_memory_in_use_is_not_available():
    """What fits the memory, but not next to other processes, would be ended by the kernel."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    total = next(int(field[1]) * 1024 for field in fields if field[0] == "MemTotal:")
    assert 0 < read_available_memory() < total
    check_size(1 << 20, "the weights", "")
    with pytest.raises(MemoryLimitError, match=r"the weights: .* GB, available: .*smaller"):
        check_size(total - (1 << 20), "the weights", "give a smaller one")


def test_limits_are_bytes():
    assert all(limit > 0 for limit in read_memory_limits())


@pytest.mark.parametrize("limits", [[], [1 << 30]])
def test_any_number_of_limits(limits):
    subprocess.run([sys.executable, "-c", CODE.format(limits)], cwd=ROOT, check=True)
