"""docs/cost.md: what `python -m benchmarks.cost` writes."""

from benchmarks.cost import generate
from tests.conftest import ROOT


def test_page_is_current():
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    assert page == generate(), "run python -m benchmarks.cost"
