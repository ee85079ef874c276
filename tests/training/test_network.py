"""Which network interface leads to node 0."""

import pytest

from DeBERTa.errors import LaunchError
from DeBERTa.training.network import check_host, find_interface, find_own_address, is_loopback


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
        check_host(address)
