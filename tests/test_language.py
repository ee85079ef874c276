"""Language that the linters do not check: glossary, words inside identifiers, length of docstrings.

Identifiers have American spelling. No text of the repository has words for which PyTorch has others.
"""

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.conftest import ROOT

SUFFIXES = {".py", ".h", ".cpp", ".sh", ".md", ".css"}
TEXTS = [path for path in ROOT.glob("*") if path.suffix in SUFFIXES]
for _name in ("DeBERTa", "benchmarks", "docs", "experiments", "tests"):
    TEXTS += sorted(path for path in (ROOT / _name).rglob("*") if path.suffix in SUFFIXES)
MODULES = [path for path in TEXTS if path.suffix == ".py"]
DOCUMENTED = [path for path in MODULES if not path.is_relative_to(ROOT / "tests")]
LONGEST_SUMMARY = 80
# Each has a term in the PyTorch documentation: full, skipped, temporary, shard, reported, saved, resume.
PRIVATE_WORDS = r"""
    whole | aside | beside | told | said | anew | kept | lest | mendable | left_?out | cut[ _]?up
    | go(es|ing)?[ _]on | went[ _]on | put[ _]together | gives?[ _]way
"""
PRIVATE = re.compile(rf"(?<![a-z])({PRIVATE_WORDS})(?![a-z])", re.VERBOSE | re.IGNORECASE)
# Of matrices: matmul, elements.
PRIVATE_IN_KERNELS = re.compile(r"(?<!dot )product|numbers", re.IGNORECASE)


def split_words(identifier: str) -> list[str]:
    """Split snake_case and CamelCase into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def find_identifiers(path: Path) -> set[str]:
    """Names that a module defines or assigns."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def read_british() -> set[str]:
    """Words that codespell's dictionary replaces by American ones."""
    text = (files("codespell_lib") / "data" / "dictionary_en-GB_to_en-US.txt").read_text(encoding="utf-8")
    return {line.partition("->")[0].lower() for line in text.splitlines() if "->" in line}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers(path):
    british = read_british()
    assert len(british) > 100
    assert not {name for name in find_identifiers(path) if british & set(split_words(name))}


def find_private_words(path: Path) -> list[str]:
    """Return the lines of a file with words of the glossary's left column."""
    is_kernel = path.suffix in {".h", ".cpp"}
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if PRIVATE.search(line) or (is_kernel and PRIVATE_IN_KERNELS.search(line))]


def test_glossary():
    found = {path: find_private_words(path) for path in TEXTS if path != Path(__file__)}
    assert len(found) > 200
    assert not {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines}


def test_private_words_are_found(tmp_path):
    lines = ["is_whole = 1", "# it goes on", "kept: int", "def go_on():", "besides, upkeep, gone only"]
    (tmp_path / "text.py").write_text("\n".join(lines))
    assert find_private_words(tmp_path / "text.py") == lines[:4]
    (tmp_path / "tiles.h").write_text("// numbers\nstruct Product;\n// product\n// dot product")
    assert find_private_words(tmp_path / "tiles.h") == ["// numbers", "struct Product;", "// product"]


def find_summaries(path: Path) -> set[str]:
    """Return the first lines of the docstrings of a module."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, documented)]
    return {(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes}


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines_of_docstrings_are_short(path):
    assert not [line for line in find_summaries(path) if len(line) > LONGEST_SUMMARY]


def test_words_are_split():
    assert split_words("read_HTTPRequest") == ["read", "http", "request"]
