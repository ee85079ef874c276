"""Which network interface leads to node 0."""

from DeBERTa.training.network import find_interface


def test_find_interface():
    assert find_interface("127.0.0.1") == "lo"
