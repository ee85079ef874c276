"""Shared fixtures: a small vocabulary, real token ids, a prepared data folder, tiny model configs."""

import contextlib
import faulthandler
import itertools
import json
import logging
import lzma
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.training.execution import select_kernels
from tests.training.batches import train_config

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"

TINY = {
    "vocab_size": 2008,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}


def pytest_unconfigure() -> None:
    """Fail, and say where, when a thread or a process keeps the interpreter from exiting.

    A worker of pytest-xdist waits for the others; the process that started it ends it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        faulthandler.dump_traceback_later(120, exit=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds that each test file took, the longest first."""
    seconds: Counter[str] = Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.location[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds per test file")
        for path, duration in seconds.most_common():
            terminalreporter.line(f"{duration:8.1f}  {path}")


@pytest.fixture(autouse=True)
def _propagate_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `caplog` see the package's messages: a command that an earlier test called has turned this off."""
    monkeypatch.setattr(logging.getLogger("DeBERTa"), "propagate", True)


def strip_times(text: str) -> str:
    """Return the output of a command without the times that start its lines when it is not a terminal."""
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text, flags=re.MULTILINE)


def read_equal_metrics(run_dir: Path) -> list[dict]:
    """Return the lines of `metrics.jsonl` without what equal runs differ in."""
    varying = {"time", "elapsed_seconds", "tokens_per_second", "peak_memory_gb"}
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in varying} for line in lines]


def tiny_model() -> dict:
    """Return a model config of two layers of 32."""
    return dict(TINY)


def tiny_rtd(sharing: str = "gdes") -> dict:
    """Return an RTD config of a generator of one layer and a discriminator of two."""
    return {
        "embedding_sharing": sharing,
        "generator": TINY | {"num_hidden_layers": 1},
        "discriminator": dict(TINY),
    }


# How a model may be computed on a CPU: flags. "torch": the classes of DeBERTa/ops on PyTorch's operations.
PATHS = {
    "plain": {"kernels": "off"},
    "eager": {"attention": "eager"},
    "sdpa": {"attention": "sdpa"},
    "kernels": {},
    "torch": {},
}


@contextlib.contextmanager
def set_tf32(is_used: bool) -> Iterator[None]:
    """Set whether float32 matmuls on a GPU use TF32: monkeypatch cannot restore these attributes."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = is_used
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def require_kernels() -> None:
    """Skip a test where the C++ kernels cannot be compiled, or DeBERTa/ops was deleted."""
    library = pytest.importorskip("DeBERTa.ops.cpu.library", reason="the package DeBERTa/ops is missing")
    if library.find_obstacle() is not None:
        pytest.skip(f"the C++ kernels are not tested: {library.find_obstacle()}")


@contextlib.contextmanager
def disable_kernels() -> Iterator[None]:
    """Compute with PyTorch's operations what DeBERTa/ops has C++ kernels for."""
    library = pytest.importorskip("DeBERTa.ops.cpu.library", reason="the package DeBERTa/ops is missing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-compiler")
        library.load_library.cache_clear()
        try:
            yield
        finally:
            library.load_library.cache_clear()


@contextlib.contextmanager
def set_threads(number: int) -> Iterator[None]:
    """Let PyTorch and the kernels use `number` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def kernels() -> None:
    """Skip a test where the C++ kernels cannot be compiled."""
    require_kernels()


@pytest.fixture(params=["kernels", "torch"])
def way(request) -> Iterator[str]:
    """Each way in which DeBERTa/ops computes on a CPU: the C++ kernels, and PyTorch's operations."""
    if request.param == "kernels":
        require_kernels()
    with disable_kernels() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=list(PATHS))
def path(request) -> Iterator[str]:
    """Each name in PATHS; `select_path` makes a model compute so."""
    if request.param == "kernels":
        require_kernels()
    elif request.param != "plain":
        pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")
    with disable_kernels() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


def select_path(model: nn.Module, path: str) -> nn.Module:
    """Make `model` compute as PATHS[path] says, on a CPU; return it."""
    select_kernels(model, train_config(**PATHS[path]), torch.device("cpu"))
    return model


@pytest.fixture
def tiles() -> None:
    """Skip a test where the kernels for AMX cannot be used."""
    require_kernels()
    from DeBERTa.ops.cpu import library

    if not library.has_tiles():
        assert "amx_bf16" not in Path("/proc/cpuinfo").read_text()
        pytest.skip("this processor has no AMX")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the golden text."""
    return Tokenizer(GOLDEN / "prepare" / "spm.model")


@pytest.fixture(scope="session")
def sample_ids(tokenizer) -> np.ndarray:
    """Return ids of the sample's first 6 MB under the golden vocabulary, int32 [tokens]."""
    with lzma.open(ROOT / "experiments" / "sample" / "state_of_the_union.txt.xz") as file:
        lines = file.read(6_000_000).decode("utf-8", errors="ignore").split("\n")
    return tokenizer.encode_utf8([line.encode() for line in lines])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer, sample_ids) -> Path:
    """Return a data directory: 600, 40 and 20 lines of 62 tokens in train, valid and test; the vocabulary."""
    folder = tmp_path_factory.mktemp("prepared")
    first = 0
    for split, lines in (("train", 600), ("valid", 40), ("test", 20)):
        rows = sample_ids[first : first + lines * 62].reshape(lines, 62)
        first += lines * 62
        text = "".join(" ".join(tokenizer.pieces[i] for i in row) + "\n" for row in rows)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    shutil.copy(tokenizer.path, folder / "spm.model")
    return folder
