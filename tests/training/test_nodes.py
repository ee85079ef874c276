"""What nodes read from the store of node 0: anybody who reaches its port can write to it."""

import json
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch.distributed as dist

from DeBERTa.errors import LaunchError
from DeBERTa.training.nodes import LONGEST_MESSAGE, Coordinator, Job, Member, read_failure
from DeBERTa.training.worker import Failure
from tests.commands import find_free_port

UNREADABLE = "another node reported a failure that cannot be read: look at the messages of every node"
FAILURE = asdict(Failure("x"))
STRANGE = [
    b"",
    b"0",
    b"[]",
    b"{}",
    b"\xff\x80cos\nsystem\n",
    b"cposix\nsystem\n(S'true'\ntR.",  # a pickle
    *(json.dumps(FAILURE | change).encode() for change in (
        {"exit_status": 0}, {"exit_status": -1}, {"exit_status": 256}, {"exit_status": "1"},
        {"exit_status": None}, {"message": 5}, {"time": "now"}, {"node": [1]}, {"more": 1},
    )),
]  # fmt: skip


@pytest.fixture
def node_0():
    return Coordinator(Job(2, 0, "127.0.0.1", find_free_port(), 1), timeout=5)


@pytest.fixture
def stranger(node_0) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", node_0.port, timeout=timedelta(seconds=5))


@pytest.mark.parametrize("text", STRANGE)
def test_a_strange_failure_is_a_failure(text):
    """It has status 1, whatever it says, and one line."""
    found = read_failure(text)
    assert (found.message, found.exit_status) == (UNREADABLE, 1)


def test_a_failure_is_one_line_of_limited_length():
    found = read_failure(Failure("first\nsecond\r\n" + "x" * 10_000, exit_status=3).to_json().encode())
    assert found.message.startswith("first second xxx")
    assert len(found.message) == LONGEST_MESSAGE
    assert found.exit_status == 3


def test_a_strange_failure_while_nodes_register(node_0, stranger):
    stranger.set("attempt-0/failure", json.dumps(FAILURE | {"exit_status": 0}))
    with pytest.raises(LaunchError, match=UNREADABLE) as error:
        node_0.register()
    assert error.value.exit_status == 1


@pytest.mark.parametrize("processes", [0, -1, "2", None, 2**40])
def test_a_strange_member(node_0, stranger, processes):
    member = asdict(Member("host", 2, 1, "token", "")) | {"processes": processes}
    stranger.set("attempt-0/node-1", json.dumps(member))
    with pytest.raises(LaunchError, match="another program uses MASTER_PORT"):
        node_0.register()


def test_a_strange_attempt(node_0, stranger):
    stranger.set("attempt", "first")
    with pytest.raises(LaunchError, match="another program uses MASTER_PORT"):
        Coordinator(Job(2, 1, "127.0.0.1", node_0.port, 1), timeout=5)
