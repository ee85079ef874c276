"""The command line: help, versions, and flags that are wrong."""

import subprocess
import sys

import pytest

from DeBERTa import __version__
from DeBERTa.train import main
from tests.conftest import ROOT, strip_times


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--no_such_flag"], "no flag --no_such_flag"),
        (["--train_batchsize=8"], "did you mean --train_batch_size"),
        (["--task_name", "GPT"], "--task_name: invalid choice: 'GPT'"),
        (["--workers", "two"], "--workers: invalid int value: 'two'"),
        (["--lr", "0.1"], "no flag --lr: did you mean --lr_schedule or --lr_schedule_ends; "),
        (["--max_seq", "3"], "no flag --max_seq: did you mean --max_seq_length"),
        (["--learning", "1"], "no flag --learning: did you mean --learning_rate"),
        (["--zero", "1"], "give --sharding zero2"),
        (["--fsdp"], "give --sharding fsdp"),
        (["tiny"], "unexpected argument 'tiny'"),
        (["--preset", "bert-tini"], "the closest names are bert-tiny"),
        (["--preset", "bert-tiny", "--config", "config.json"], "--preset and --config"),
        (["--corpus", "sample"], "--preset"),
    ],
)
def test_wrong_flags_are_usage_errors(wrong, named, capsys):
    """One line that names what is wrong and what is right, and status 2."""
    assert main(wrong) == 2
    output = capsys.readouterr()
    (error,) = strip_times(output.err).splitlines()
    assert not output.out
    assert error.startswith("error: ")
    assert named in error


def run_with(flag: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "DeBERTa.train", flag]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_and_version():
    result = run_with("--help")
    assert result.returncode == 0
    assert not result.stderr
    text = " ".join(result.stdout.split())
    for flag in (
        "--train_batch_size N batch size over all ranks (sequences per optimizer step; default: 256)",
        "--lr_schedule_ends X",
        "--sharding {none,zero2,fsdp}",
    ):
        assert flag in text
    for group in ("task:", "model:", "data:", "optimization:", "computation:", "ranks:", "run directory:"):
        assert f"\n{group}\n" in result.stdout
    for alias in ("--fp16", "--vocab_type"):
        assert alias not in result.stdout
    result = run_with("--version")
    assert result.returncode == 0
    assert __version__ in result.stdout
