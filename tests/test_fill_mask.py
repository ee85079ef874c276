"""The command that fills masks."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from DeBERTa import MaskedLanguageModel
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.fill_mask import main
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import fill_masks, open_model
from tests.conftest import ROOT, TINY, strip_times
from tests.hub.exported import VOCABULARY, build_model

TEXT = "The [MASK] of the [MASK]."


def test_predictions(tmp_path, capsys):
    """A block per mask, a line per token: probability and text."""
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    assert main([str(tmp_path / "generator"), TEXT, "--top_k", "2"]) == 0
    output = capsys.readouterr().out
    blocks = [block.splitlines() for block in output.strip("\n").split("\n\n")]
    expected = fill_masks(*open_model(tmp_path / "generator", MaskedLanguageModel), TEXT, 2)
    for lines, predictions in zip(blocks, expected, strict=True):
        assert lines == [f"{p:7.2%}  {piece.replace(chr(0x2581), ' ')}" for piece, p in predictions]


def test_control_characters_of_a_vocabulary(tmp_path, capsys):
    """They do not reach the terminal."""
    content = VOCABULARY.read_bytes()
    assert content.count(b"\n\x05ation") == 1  # a piece, with its tag and length
    (tmp_path / "spm.model").write_bytes(content.replace(b"\n\x05ation", b"\n\x05\x1b[31m"))
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(tmp_path / "spm.model"), None)
    assert main([str(tmp_path / "generator"), "[MASK]", "--top_k", "3000"]) == 0
    output = capsys.readouterr().out
    assert r"%  \x1b[31m" in output
    assert "\x1b" not in output


def run_in_shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess:
    script = f'unset PYTHONUNBUFFERED; "$0" -m DeBERTa.fill_mask "$@" {redirections}'
    command = ["bash", "-c", script, sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_output(tmp_path, closed):
    """No traceback, and the status of the command, as all commands."""
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    for text, status in ((TEXT, 0), ("nothing to fill", 1)):
        done = run_in_shell(closed, str(tmp_path / "generator"), text)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[TEXT], [TEXT, "--top_k", "2000"], ["--help"]])
def test_a_full_output(tmp_path, arguments):
    """The result cannot be written: one sentence, and not the status of a success."""
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    done = run_in_shell(">/dev/full", str(tmp_path / "generator"), *arguments)
    assert done.returncode == 1
    assert strip_times(done.stderr) == "error: standard output: No space left on device\n"


def test_a_pipe_in_place_of_weights(tmp_path, capsys):
    os.mkfifo(tmp_path / "model.safetensors")
    shutil.copy(VOCABULARY, tmp_path / "spm.model")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert main([str(tmp_path), TEXT]) == 1
    message = f"no weights file {tmp_path}/model.safetensors: it is not a regular file; check the path"
    assert message in capsys.readouterr().err


def test_text_in_another_encoding(tmp_path, capsys):
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    assert main([str(tmp_path / "generator"), os.fsdecode(b"x\xff [MASK]")]) == 1
    assert "the text is not valid UTF-8" in capsys.readouterr().err


def test_errors(tmp_path, capsys):
    assert main([str(tmp_path), TEXT]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    for name in ("model.safetensors", "optimizer.pt"):
        (tmp_path / name).touch()
    assert main([str(tmp_path), TEXT]) == 1
    assert "it is that of a checkpoint; python -m DeBERTa.export writes one" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), TEXT, "--top_k", "0"]) == 2
    assert "--top_k" in capsys.readouterr().err
