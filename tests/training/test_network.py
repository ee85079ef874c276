"""Which network interface leads to node 0."""

import socket
import time

import pytest

from DeBERTa.errors import LaunchError
from DeBERTa.training.network import find_interface, find_own_address, is_loopback, wait_for_host


def test_find_interface():
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("no.such.host.invalid") is None


def test_own_address():
    assert is_loopback(find_own_address("127.0.1.1"))
    assert not is_loopback("10.0.0.1")
    assert find_own_address("no.such.host.invalid") is None


@pytest.mark.parametrize("address", ["node0..cluster", ".node0", "n" * 64, "no such host", "node.invalid"])
def test_names_that_are_no_hosts(address):
    with pytest.raises(LaunchError, match=r"no such host is known here .*; export the name or address of"):
        wait_for_host(address, 0)


def test_a_name_that_comes_later(monkeypatch, caplog):
    """As that of a pod, which a cluster makes when it starts it. A name that no host can have never comes."""
    monkeypatch.setattr("DeBERTa.training.network.RESOLVE_SECONDS", 0.05)
    resolve, started = socket.getaddrinfo, time.monotonic()

    def resolve_later(address, port):
        return resolve("127.0.0.1" if time.monotonic() > started + 0.3 else address, port)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_later)
    wait_for_host("node.invalid", 60)
    assert 0.3 < time.monotonic() - started < 30
    (message,) = caplog.messages
    assert message.startswith("MASTER_ADDR node.invalid: no such host is known here (")
    assert message.endswith("): waiting up to 60 s for it")
    monkeypatch.undo()
    with pytest.raises(LaunchError, match="no such host"):
        wait_for_host("node0..cluster", 60)
