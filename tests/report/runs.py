"""Tiny runs that learn within seconds: text in which most words are followed by the same word."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from DeBERTa.data.tokenizer import Tokenizer
from tests.conftest import GOLDEN, ROOT, TINY
from tests.runs import build_arguments

WORDS, TOKENS = 64, 62
STEPS = 120
WIDER = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "hidden_size": 64,
    "intermediate_size": 128,
}


def write_text(folder: Path) -> Path:
    """Write a data directory with its vocabulary: 64 words in cyclic order, with a jump after 15 %."""
    tokenizer = Tokenizer(GOLDEN / "prepare" / "spm.model")
    words = [piece for piece in tokenizer.pieces[4:-1] if piece[0] == "▁" and len(piece) > 3][:WORDS]
    generator = np.random.default_rng(0)
    for split, lines in (("train", 600), ("valid", 40)):
        rows = generator.integers(0, WORDS, (lines, TOKENS))
        jumps = generator.random((lines, TOKENS)) < 0.15
        for column in range(1, TOKENS):
            following = (rows[:, column - 1] + 1) % WORDS
            rows[:, column] = np.where(jumps[:, column], rows[:, column], following)
        text = "".join(" ".join(words[i] for i in row) + "\n" for row in rows)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    shutil.copy(tokenizer.path, folder / "spm.model")
    return folder


def train(run_dir: Path, data: Path, before: str = "", **flags: object) -> Path:
    """Train in a process of its own, which first executes `before`; return the run directory."""
    config = run_dir.with_suffix(".json")
    config.write_text(json.dumps({"generator": TINY | WIDER, "discriminator": TINY | WIDER}))
    values = {
        "task_name": "RTD", "model_config": config, "data_dir": data, "vocab_path": data / "spm.model",
        "output_dir": run_dir, "do_train": True, "max_seq_length": TOKENS + 2, "num_training_steps": STEPS,
        "dump_interval": 40, "log_interval": 10, "warmup": 10, "train_batch_size": 16, "learning_rate": 1e-3,
        "precision": "fp32", "workers": 0,
    }  # fmt: skip
    program = f"{before}\nimport sys\nfrom DeBERTa.train import main\nsys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", program, *build_arguments(values | flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return run_dir
