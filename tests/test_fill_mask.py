"""The command that fills masks."""

import os
import subprocess
import sys

import pytest

from DeBERTa import MaskedLanguageModel
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.fill_mask import main
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import fill_masks, open_model
from tests.conftest import ROOT
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_output(tmp_path, closed):
    """No traceback, and the status of the command, as all commands."""
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    for text, status in ((TEXT, 0), ("nothing to fill", 1)):
        script = f'"$0" -m DeBERTa.fill_mask "$1" "$2" {closed}'
        arguments = [sys.executable, str(tmp_path / "generator"), text]
        done = subprocess.run(
            ["bash", "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


def test_text_in_another_encoding(tmp_path, capsys):
    (generator, _) = list_models(build_model("deberta-v3"))
    write_model(generator, tmp_path / "generator", Tokenizer(VOCABULARY), None)
    assert main([str(tmp_path / "generator"), os.fsdecode(b"x\xff [MASK]")]) == 1
    assert "the text is not valid UTF-8" in capsys.readouterr().err


def test_errors(tmp_path, capsys):
    assert main([str(tmp_path), TEXT]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), TEXT, "--top_k", "0"]) == 2
    assert "--top_k" in capsys.readouterr().err
