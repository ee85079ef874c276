"""The command that shows replaced tokens."""

import io
import re
import sys
from html.parser import HTMLParser

import pytest

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.detect import format_lines, format_page, main
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import TokenProbability
from tests.hub.exported import VOCABULARY, build_model

TOKENS = [TokenProbability("\u2581a", 0.0), TokenProbability("<b>", 0.5), TokenProbability("\u2581c", 1.0)]


@pytest.fixture(scope="module")
def discriminator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "discriminator"
    write_model(list_models(build_model("deberta-v3"))[1], folder, Tokenizer(VOCABULARY), None)
    return folder


def test_lines(discriminator, capsys):
    """Without a terminal: probability and text, no colors."""
    assert main([str(discriminator), "The Senate."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "".join(line[9:] for line in lines) == " The Senate."
    assert all(re.fullmatch(r" *\d+\.\d\d%  .*", line) for line in lines)
    assert format_lines(TOKENS, is_terminal=False) == "  0.00%   a\n 50.00%  <b>\n100.00%   c\n"


def test_colors():
    """On a terminal every token has a background, from black (16) to red (196); the text follows."""
    *lines, text = format_lines(TOKENS, is_terminal=True).splitlines()
    assert len(lines) == 3
    assert re.findall(r"\x1b\[48;5;(\d+)m", text)[::2] == ["16", "196"]
    assert re.sub(r"\x1b\[[\d;]+m", "", text) == " a<b> c"
    assert text.endswith("\x1b[0m")


def test_control_characters_of_a_vocabulary():
    """They do not reach the terminal, where they would color or erase what follows."""
    token = TokenProbability("\u2581\x1b[31m\u202e", 0.0)
    assert format_lines([token], is_terminal=False) == "  0.00%   \\x1b[31m\\u202e\n"
    assert format_lines([token], is_terminal=True).count("\x1b[31m") == 0
    assert "\x1b" not in format_page([token])


@pytest.mark.parametrize("flags", [[], ["--html"]])
def test_output_in_another_encoding(tmp_path, monkeypatch, flags):
    """The page is the same; lines have escapes for what the encoding lacks."""
    piece, content = "\u00f6\u6f22", VOCABULARY.read_bytes()
    assert content.count(b"\n\x05ation") == 1  # a piece, with its tag and length
    (tmp_path / "spm.model").write_bytes(content.replace(b"ation", piece.encode()))
    tokenizer = Tokenizer(tmp_path / "spm.model")
    write_model(list_models(build_model("deberta-v3"))[1], tmp_path / "model", tokenizer, None)
    printed = {}
    for encoding in ("utf-8", "latin-1", "ascii"):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
        assert main([str(tmp_path / "model"), f"A {piece}", *flags]) == 0
        printed[encoding] = output.getvalue()
    text = printed["utf-8"].decode()
    assert ("&#246;&#28450;" if flags else piece) in text
    assert text.isascii() == bool(flags)
    for encoding, found in printed.items():
        assert found == text.encode(encoding, "backslashreplace")


def test_page(discriminator, capsys):
    """Well-formed, the text escaped, the probability as tooltip."""
    assert main([str(discriminator), "The <b>Senate</b>", "--html"]) == 0
    assert "<b>" not in capsys.readouterr().out
    texts, tooltips = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, _, attributes):
            tooltips.extend(value for name, value in attributes if name == "title")

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(format_page(TOKENS))
    assert "".join(texts).endswith(" a<b> c\n\n")
    assert tooltips == ["0.00%", "50.00%", "100.00%"]


def test_errors(discriminator, tmp_path, capsys):
    assert main([str(tmp_path), "text"]) == 1
    assert main([str(discriminator)]) == 2
    capsys.readouterr()
    assert main([str(discriminator), "word " * 400]) == 1
    assert "the model takes 320" in capsys.readouterr().err
    assert main([str(discriminator), "  "]) == 1
    assert "the text is blank" in capsys.readouterr().err
