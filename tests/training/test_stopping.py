"""Signals to runs of several processes, at moments that matter: to the command, to some of its processes, to all."""

import os
import signal

import pytest

from tests.commands import (
    ENDLESS,
    Command,
    free_port,
    port_is_free,
    saved_something,
    start_nodes,
    two_process_flags,
)


@pytest.fixture
def flags(prepared, tmp_path) -> dict:
    return two_process_flags(tmp_path, prepared)


@pytest.fixture
def endless(flags) -> dict:
    return flags | ENDLESS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_run_after_a_save(endless, number):
    endless |= {"dump_interval": 1_000_000}
    command = Command(endless, "-m", "DeBERTa.train")
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    command.process.send_signal(number)
    assert command.finish() == 128 + number, command.printed.read_text()
    assert saved_something(command)()
    assert not command.workers()
    assert "Traceback" not in command.printed.read_text()


def test_usr1_to_the_launcher_saves_and_goes_on(flags):
    command = Command(flags | {"num_training_steps": 300, "dump_interval": 1_000_000, "log_interval": 10})
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    command.process.send_signal(signal.SIGUSR1)
    assert command.finish() == 0, command.printed.read_text()
    early, last = sorted(path.name for path in (command.run_dir / "checkpoints").glob("step-*"))
    assert "step-00000010" <= early < last == "step-00000300"


def test_a_signal_to_launcher_and_processes_at_once(endless):
    """As a service manager ends a job: each process gets it twice, and saves all the same."""
    command = Command(endless | {"dump_interval": 1_000_000})
    command.wait_for(lambda: "step 10/" in command.printed.read_text())
    for process in (*command.workers().values(), command.process.pid):
        os.kill(process, signal.SIGTERM)
    assert command.finish() == 143, command.printed.read_text()
    assert saved_something(command)()
    assert not command.workers()


def test_a_signal_to_one_process_ends_all(endless):
    port = free_port()
    runs = start_nodes(endless | {"nproc_per_node": 1, "dump_interval": 1_000_000}, port)
    runs[0].wait_for(lambda: "step 10/" in runs[0].printed.read_text())
    os.kill(runs[1].workers()[1], signal.SIGTERM)
    for node in runs:
        assert node.finish() == 143, node.printed.read_text()
        assert not node.workers()
    assert saved_something(runs[0])()
    assert not saved_something(runs[1])()  # node 0 writes
    assert port_is_free(port)
