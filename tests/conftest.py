"""Shared fixtures: a small vocabulary, real token ids, a prepared data folder, tiny model configs."""

import json
import lzma
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.ops.cpu import library

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


def strip_times(text: str) -> str:
    """Return the output of a command without the times that start its lines when it is not a terminal."""
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text, flags=re.MULTILINE)


def read_equal_metrics(run_dir: Path) -> list[dict]:
    """Return the lines of `metrics.jsonl` without what equal runs differ in."""
    varying = {"time", "elapsed_seconds", "tokens_per_second", "peak_memory_gb"}
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in varying} for line in lines]


def tiny_model() -> dict:
    return dict(TINY)


def tiny_rtd(sharing: str = "gdes") -> dict:
    return {
        "embedding_sharing": sharing,
        "generator": TINY | {"num_hidden_layers": 1},
        "discriminator": dict(TINY),
    }


@pytest.fixture(params=["kernels", "torch"])
def way(request) -> Iterator[str]:
    """Each way in which DeBERTa/ops computes on a CPU: the compiled kernels, and PyTorch's operations."""
    if request.param == "kernels" and library.find_obstacle() is not None:
        pytest.skip(f"the kernels are not tested: {library.find_obstacle()}")
    library.enable(request.param == "kernels")
    yield request.param
    library.enable(True)


@pytest.fixture
def tiles() -> None:
    if not library.has_tiles():
        assert "amx_bf16" not in Path("/proc/cpuinfo").read_text()
        pytest.skip("this processor has no AMX")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "prepare" / "spm.model")


@pytest.fixture(scope="session")
def sample_ids(tokenizer) -> np.ndarray:
    """Ids of the bundled sample's first 6 MB under the golden vocabulary, int32 [tokens]."""
    with lzma.open(ROOT / "experiments" / "sample" / "state_of_the_union.txt.xz") as file:
        lines = file.read(6_000_000).decode("utf-8", errors="ignore").split("\n")
    return np.array([i for line in tokenizer.encode_lines(lines) for i in line], dtype=np.int32)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer, sample_ids) -> Path:
    """A data folder with train, valid and test splits of 600, 40 and 20 lines of 62 tokens, and the vocabulary."""
    folder = tmp_path_factory.mktemp("prepared")
    first = 0
    for split, lines in (("train", 600), ("valid", 40), ("test", 20)):
        rows = sample_ids[first : first + lines * 62].reshape(lines, 62)
        first += lines * 62
        text = "".join(" ".join(tokenizer.pieces[i] for i in row) + "\n" for row in rows)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    shutil.copy(tokenizer.path, folder / "spm.model")
    return folder
