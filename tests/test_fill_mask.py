"""The command that fills masks."""

from DeBERTa import MaskedLanguageModel
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.fill_mask import main
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import fill_masks, open_model
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


def test_errors(tmp_path, capsys):
    assert main([str(tmp_path), TEXT]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), TEXT, "--top_k", "0"]) == 2
    assert "--top_k" in capsys.readouterr().err
