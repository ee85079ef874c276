"""Memory limits of control groups, which may be absent."""

import pytest

from DeBERTa.training import memory


def test_limits_are_bytes():
    assert all(limit > 0 for limit in memory.read_memory_limits())


@pytest.mark.parametrize("limits", [[], [1 << 30]])
def test_any_number_of_limits(monkeypatch, limits):
    monkeypatch.setattr(memory, "read_memory_limits", lambda: limits)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    memory.keep_freed_memory()
