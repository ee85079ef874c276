"""Language that the linters do not check: words inside identifiers, and the length of docstrings.

Identifiers have American spelling and the terms of the field.
"""

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each has a term in the PyTorch documentation: full, skipped, temporary, shard, reported, rank 0, retryable.
PRIVATE_WORDS = {"whole", "aside", "beside", "told", "said", "anew", "mendable", "leftout", "cutup", "lest"}
MODULES = sorted((ROOT / "DeBERTa").rglob("*.py"))
DOCUMENTED = [*MODULES, *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")]
LONGEST_SUMMARY = 80


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
    refused = read_british() | PRIVATE_WORDS
    assert len(refused) > 100
    wrong = {name for name in find_identifiers(path) if refused & set(split_words(name))}
    assert not wrong


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
