"""Data workers: they change nothing, their errors arrive as they are, and scarce memory loses nothing."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from DeBERTa.data.dataset import BatchPlan, EvaluationBatches, TrainingBatches
from DeBERTa.data.loader import PREFETCHED, load_batches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.errors import DataError
from tests.conftest import ROOT

PLAN = BatchPlan(seed=7, batch_size=24, max_seq_length=64)


@pytest.fixture(scope="module")
def batches(prepared, tokenizer) -> TrainingBatches:
    store = open_store(prepared / "train.txt", tokenizer, max_tokens=62)
    return TrainingBatches(store, tokenizer, Masker(tokenizer, 3, is_always_masked=False), PLAN)


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_change_nothing(batches, workers):
    """Also when the slots of shared memory are used a second and a third time."""
    steps = range(4, 4 + 3 * workers * PREFETCHED)
    found = list(load_batches(batches, steps, workers))
    for alone, prepared in zip(load_batches(batches, steps, 0), found, strict=True):
        for one, other in zip((*alone[:4], *alone.masked), (*prepared[:4], *prepared.masked), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        assert alone.real_tokens == prepared.real_tokens


def test_the_last_batch_of_an_evaluation_is_smaller(prepared, tokenizer):
    store = open_store(prepared / "valid.txt", tokenizer, max_tokens=62)
    batches = EvaluationBatches(store, tokenizer, Masker(tokenizer, 1, is_always_masked=True), PLAN)
    assert [len(batch.labels) for batch in load_batches(batches, [0, 1, 1], 2)] == [24, 16, 16]


def test_a_batch_without_masked_tokens(batches, monkeypatch):
    monkeypatch.setattr("DeBERTa.data.masking.MASKED_SHARE", 0.0)
    (batch,) = load_batches(batches, [0], 1)
    assert batch.masked_tokens == 0


class DamagedBatches(TrainingBatches):
    """Batches of which number 2 cannot be read."""

    def __getitem__(self, step: int):
        if step == 2:
            raise DataError("train.ids is damaged: remove it")
        return super().__getitem__(step)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_data_worker_is_that_error(batches, workers):
    damaged = DamagedBatches(batches.store, batches.tokenizer, batches.masker, PLAN)
    loader = load_batches(damaged, range(5), workers)
    next(loader)
    next(loader)
    with pytest.raises(DataError, match=r"^train.ids is damaged: remove it$"):
        next(loader)


class HugeBatches(TrainingBatches):
    """Batches of which number 2 needs more memory than there is."""

    def __getitem__(self, step: int):
        return np.ones(1 << 50) if step == 2 else super().__getitem__(step)


@pytest.mark.parametrize("workers", [0, 2])
def test_out_of_memory_in_a_data_worker(batches, workers):
    loader = load_batches(
        HugeBatches(batches.store, batches.tokenizer, batches.masker, PLAN), range(5), workers
    )
    next(loader)
    next(loader)
    with pytest.raises(MemoryError, match="Unable to allocate"):
        next(loader)


UNFINISHED = """
import sys
from pathlib import Path
from DeBERTa.data.dataset import BatchPlan, TrainingBatches
from DeBERTa.data.loader import load_batches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer

class Cycle:
    pass

def fail(loader):
    next(loader)
    raise KeyError("a fault")

folder = Path(sys.argv[1])
tokenizer = Tokenizer(folder / "spm.model")
store = open_store(folder / "train.txt", tokenizer, max_tokens=62)
batches = TrainingBatches(store, tokenizer, Masker(tokenizer, 1, True), BatchPlan(7, 4, 64))
loader = load_batches(batches, range(1000), 2)
next(loader)
if sys.argv[2] == "a traceback":
    fail(loader)
if sys.argv[2] == "a cycle":
    cycle = Cycle()
    cycle.itself, cycle.loader = cycle, loader
    del cycle, loader
if sys.argv[2] == "no memory":
    batches.__class__.__getitem__ = lambda *_: bytes(1 << 60)
    loader = load_batches(batches, range(1000), 2)
    next(loader)
"""


@pytest.mark.parametrize("holder", ["a variable", "a traceback", "a cycle", "no memory"])
def test_a_process_exits_with_its_data_workers(prepared, holder):
    """Also when something still holds the iterator. Data workers ignore SIGTERM."""
    command = [sys.executable, "-c", UNFINISHED, str(prepared), holder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    last = {"a traceback": "KeyError: 'a fault'", "no memory": "MemoryError"}.get(holder)
    assert result.stderr.splitlines()[-1:] == ([last] if last else [])
    assert result.returncode == (1 if last else 0)


LIMITED = """
import resource, subprocess, sys
from pathlib import Path
from DeBERTa.data.dataset import BatchPlan, TrainingBatches
from DeBERTa.data.loader import load_batches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import StorageError

def load(case, workers):
    try:
        rows = [len(batch.labels) for batch in load_batches(batches, range(3), workers)]
        print(case, workers, sum(rows))
    except StorageError as error:
        print(case, workers, error)

folder = Path(sys.argv[1])
tokenizer = Tokenizer(folder / "spm.model")
store = open_store(folder / "train.txt", tokenizer, max_tokens=62)
batches = TrainingBatches(store, tokenizer, Masker(tokenizer, 1, True), BatchPlan(7, 600, 64))
for size in ("64k", "4k"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    load(size, 1)
subprocess.run(["umount", "/dev/shm"], check=True)
subprocess.run(["mount", "-o", "remount,ro", "/dev/shm"], check=True)
load("locked", 1)
subprocess.run(["umount", "/dev/shm"], check=True)
load("before", 2)
for limit in (14, 20, 26, 28, 30, 33, 36):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    load("files", 2)
"""


@pytest.mark.usefixtures("batches")  # it makes the token ids, which shows a progress bar
def test_little_shared_memory_and_few_open_files(prepared):
    """A batch of 600 lines does not fit in 64 KB. No limit on open files makes a run hang.

    The test fails where the system forbids to mount in a namespace of its own.
    """
    unshare = [shutil.which("unshare"), "--map-root-user", "--mount"]
    command = [*unshare, sys.executable, "-c", LIMITED, str(prepared)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, f"unshare or mount not permitted, or it failed: {result.stderr}"
    large, small, locked, before, *limited = result.stdout.splitlines()
    assert (large, before) == ("64k 1 1800", "before 2 1800")
    for part in ("/dev/shm", "--shm-size", "--workers 0"):
        assert part in small
    assert locked.endswith(
        "Read-only file system, for their locks in /dev/shm; make it writable, or give --workers 0"
    )
    few = "files 2 data workers need more open files than allowed: raise `ulimit -n`, or give fewer --workers"
    assert set(limited) == {few, before.replace("before", "files")}
    assert result.stderr == ""
