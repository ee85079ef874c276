"""The README and docs/: every command is run by tests/slow/test_documented_commands.py, or has a reason."""

import re

import pytest

from tests.conftest import ROOT
from tests.documented import (
    FOREIGN,
    NOT_RUN,
    PAGES,
    RUN,
    extract_all,
    extract_commands,
    extract_flags,
    find_flags,
    find_known_flags,
    find_reason,
    find_sources,
)

COMMANDS = extract_all()
IDS = [command.splitlines()[0] for _, command in COMMANDS]


def test_extraction():
    """Blocks, scripts, continued lines, comments, variables before a program, inline code over two lines."""
    page = """Run `./rtd.sh NAME
--tag x`, not `NAME`, or `DATA=sample ./mlm.sh a`.
```bash
export A=1   # a variable
export B=2
./rtd.sh one \\
  --tag two   # three
# four
```
```python
import os
```
```bash
#!/bin/bash
srun x
```
"""
    assert extract_commands(page) == [
        "export A=1; export B=2; ./rtd.sh one --tag two",
        "#!/bin/bash\nsrun x",
        "./rtd.sh NAME --tag x",
        "DATA=sample ./mlm.sh a",
    ]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=IDS)
def test_every_command_is_run_or_has_a_reason(page, command):
    assert find_reason(command) or RUN.match(command), f"{page.name}: neither run nor listed: {command}"


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_reason_is_used(pattern):
    assert any(re.search(pattern, command) for _, command in COMMANDS)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=IDS)
def test_flags_of_a_command_exist(page, command):
    if find_sources(command):
        assert extract_flags(command) <= find_flags(command) | FOREIGN, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_on_a_page_exist(page):
    sources = [
        path for top in ("DeBERTa", "experiments", "benchmarks") for path in (ROOT / top).rglob("*.py")
    ]
    known = find_known_flags(*sources) | find_flags("./rtd.sh") | FOREIGN
    assert extract_flags(page.read_text(encoding="utf-8")) <= known
