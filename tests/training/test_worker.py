"""Failures: what a rank records, what its launcher reads, and which of several is the cause."""

import signal

import pytest

from DeBERTa.errors import ConfigError, DataWorkerError, PeerLostError
from DeBERTa.training.worker import Failure, get_stop_signal


@pytest.mark.parametrize(
    ("error", "message", "is_retryable", "is_consequence", "is_explained"),
    [
        (ConfigError("--seed: negative"), "--seed: negative", False, False, True),
        (DataWorkerError("a data worker died"), "a data worker died", True, False, True),
        (PeerLostError("connection lost"), "connection lost", True, True, False),
        (KeyError("loss"), "KeyError: 'loss'", False, False, False),
    ],
)
def test_a_recorded_error_is_read_back(tmp_path, error, message, is_retryable, is_consequence, is_explained):
    record = tmp_path / "0.json"
    record.write_text(Failure.from_error(error).to_json())
    failure = Failure.from_exit_code(1, record)
    assert (failure.message, failure.exit_status) == (message, 1)
    assert (failure.is_retryable, failure.is_consequence) == (is_retryable, is_consequence)
    assert failure.is_explained == is_explained
    assert not failure.is_stop


@pytest.mark.parametrize("text", [None, "", '{"message": "a torn rec'])
def test_a_rank_without_a_readable_record(tmp_path, text):
    record = tmp_path / "0.json"
    if text is not None:
        record.write_text(text)
    failure = Failure.from_exit_code(3, record)
    assert failure.message == "exited with status 3"
    assert failure.is_retryable


VALID = Failure("a disk is full", exit_status=1, is_explained=True)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "3", "[" * 100_000, b"\xff", '{"message": 3}', '{"message": "m", "rank": 0}',
        *(f'{{"message": "m", "exit_status": {status}}}' for status in (0, -1, 256, '"1"', "true", "1.0")),
        VALID.to_json().replace("false", "0"),
    ],
)  # fmt: skip
def test_a_failure_of_another_shape_is_a_failure(tmp_path, text):
    """Another machine may have sent it: it never ends a run with status 0."""
    assert (
        Failure.from_json(text).message
        == "another node reported a failure that cannot be read: look at the messages of every node"
    )
    assert Failure.from_json(text).exit_status == 1
    (tmp_path / "0.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert Failure.from_exit_code(3, tmp_path / "0.json").message == "exited with status 3"
    assert Failure.from_json(VALID.to_json()) == VALID


def test_a_killed_rank_may_be_started_again(tmp_path):
    failure = Failure.from_exit_code(-signal.SIGKILL, tmp_path / "0.json")
    assert failure.message == "killed by SIGKILL"
    assert failure.is_retryable
    assert not failure.is_stop


@pytest.mark.parametrize(
    ("code", "number"), [(143, 15), (-15, 15), (130, 2), (-2, 2), (1, 0), (-9, 0), (137, 0)]
)
def test_stop_signals(code, number):
    assert get_stop_signal(code) == number


def test_causes_come_before_stops_before_consequences():
    """Of ranks that ended at once, one that was killed comes before one that NCCL aborted for it."""
    lost = Failure.from_error(PeerLostError("connection lost"))
    stopped = Failure.from_exit_code(143)
    aborted, killed = (Failure.from_exit_code(-number) for number in (signal.SIGABRT, signal.SIGKILL))
    first, second = Failure("first", time=1.0), Failure("second", time=2.0)
    ordered = [first, second, killed, aborted, stopped, lost]
    assert sorted([lost, stopped, aborted, killed, second, first], key=lambda one: one.order) == ordered
