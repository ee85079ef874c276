"""Imports between the parts of the package, and the page about them."""

import ast
from graphlib import TopologicalSorter

from tests.conftest import ROOT

PACKAGE = ROOT / "DeBERTa"
# Modules without a test file of their own, and where they are tested.
TESTED_ELSEWHERE = {
    "command.py": "status and message of every command: test_misuse.py, test_fill_mask.py and others",
    "data/encode.py": "the encoding processes of data/prepare.py: data/test_prepare.py",
    "errors.py": "classes that the tests of those who raise them expect",
    "hub/names.py": "names of weights, by files that have them: hub/test_published.py",
    "ops/autocast.py": "against plain layers on a GPU: gpu/test_triton.py; where: ops/test_selection.py",
    "ops/cpu/modules.py": "golden figures on every path: model/test_golden.py; where: ops/test_selection.py",
    "ops/triton/launch.py": "every entry of its tables is compiled: ops/triton/test_kernels.py",
}


def list_imports() -> dict[str, set[str]]:
    """Return which packages and modules in DeBERTa/ each of them imports, also within functions."""
    imports: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found = imports.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("DeBERTa.")} - {part}
    del imports["__init__"]  # imports the public names at their first use
    return imports


def test_nothing_imports_what_imports_it():
    """Each part can be read, and used, without those above it."""
    imports = list_imports()
    assert {"config", "data", "model"} <= imports["training"]
    order = list(TopologicalSorter(imports).static_order())
    assert order.index("errors") < order.index("data") < order.index("model") < order.index("training")


def test_the_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in page] == []
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert [name for name in packages if f"`{name}/`" not in page] == []


def test_tests_mirror_the_package():
    """tests/X/test_Y.py for DeBERTa/X/Y.py."""
    tests = ROOT / "tests"
    untested = [
        path
        for module in PACKAGE.rglob("*.py")
        if module.name != "__init__.py" and "modeling" not in module.parts
        for path in [module.relative_to(PACKAGE)]
        if not (tests / path.with_name(f"test_{path.stem.strip('_')}.py")).exists()
    ]
    assert sorted(map(str, untested)) == sorted(TESTED_ELSEWHERE)
