"""Launcher: starts one worker per device from the variables of a node.

The command is the same on every node. A user exports on each node WORLD_SIZE (the number of nodes), RANK (the
number of this node), and MASTER_ADDR and MASTER_PORT (the address of node 0). A worker receives variables of
the same names, as torchrun sets them: WORLD_SIZE is the number of *ranks*, and RANK its own.

A run is a number of attempts, more than one with `--max_restarts`. In each, the nodes register with node 0,
start their workers, and wait until all have succeeded or one has failed.
"""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError, LaunchError
from DeBERTa.files import raise_storage_errors
from DeBERTa.processes import STOP_SIGNALS, RunInterrupted, list_handled_signals
from DeBERTa.training import worker
from DeBERTa.training.network import find_interface, is_loopback
from DeBERTa.training.nodes import GRACE_SECONDS, Coordinator, Job, Member, describe_loss, wait_until
from DeBERTa.training.worker import Failure, get_stop_signal

ALONE = "or unset WORLD_SIZE and RANK to train on this node alone"

logger = logging.getLogger(__name__)


def find_job(config: TrainConfig) -> Job | None:
    """Return the job to launch on this node, or None to train in this process.

    A process trains as a worker (of our launcher or torchrun's), and for one process on one node. Raises
    `ConfigError` for variables and flags that cannot work.
    """
    if worker.is_worker():
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):  # perhaps of another shell
            if _read_integer(name, -1) < 0:
                raise ConfigError(
                    f"{name} is not a number from 0, but LOCAL_RANK and TORCHELASTIC_RUN_ID are set, as by "
                    "torchrun: start with torchrun, or unset them"
                )
        return None
    nodes, node = _read_integer("WORLD_SIZE", 1), _read_integer("RANK", 0)
    if nodes < 1:
        raise ConfigError(f"WORLD_SIZE is {nodes}: export the number of nodes, 1 or more, or unset it")
    if not 0 <= node < nodes:
        raise ConfigError(
            f"RANK is {node}, WORLD_SIZE {nodes}: export its number, from 0 to {nodes - 1}, {ALONE}"
        )
    gpus = torch.cuda.device_count()
    processes = config.nproc_per_node or gpus or 1
    if gpus and processes > gpus:
        raise ConfigError(f"--nproc_per_node {processes}: each needs a GPU; give at most {gpus}")
    if nodes == 1:
        return Job(1, 0, "127.0.0.1", 0, processes) if processes > 1 else None
    address, port = os.environ.get("MASTER_ADDR", ""), _read_integer("MASTER_PORT", 0)
    if not (address and port):
        raise ConfigError(
            f"WORLD_SIZE is {nodes}, but {'MASTER_PORT' if address else 'MASTER_ADDR'} is not set: export "
            f"MASTER_ADDR and MASTER_PORT, the address of node 0, on every node, {ALONE}"
        )
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}: export a port from 1 to 65535 that is free on node 0")
    return Job(nodes, node, address, port, processes)


def _read_integer(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: export an integer, or unset it") from None


def launch(job: Job, config: TrainConfig, arguments: Sequence[str]) -> int:
    """Run this node's workers until they end, and return the exit status.

    It is 0 if all workers of all nodes succeeded, and 128 plus its number after a signal. Raises
    `LaunchError` if the nodes cannot start together, or with the message of the worker that failed.
    """
    logs = worker.get_log_path(config.run_dir, 0).parent
    with raise_storage_errors(logs):
        _, sys.stderr = worker.redirect_stderr(logs / f"node-{job.node:04d}.log")
    supervisor = Supervisor(job, config, arguments)
    coordinator = None
    try:
        if job.nodes > 1:
            where = f"node {job.node} of {job.nodes}, with node 0 at {job.address}:{job.port}"
            logger.info(f"{where}: waiting up to {config.dist_timeout} s for the other nodes")
        coordinator = Coordinator(job, config.dist_timeout)
        failure = run_attempts(supervisor, coordinator, config)
    except RunInterrupted as stop:  # no workers are running
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the other nodes have to be informed
        failure = describe_failure(Failure.from_exit_code(stop.exit_status), job)
        if coordinator is not None:
            coordinator.report(failure)
            coordinator.leave()
    except dist.DistError:
        raise LaunchError(describe_loss(job)) from None
    if failure is None:
        return 0
    if not failure.is_stop:
        launch_error = LaunchError(failure.message)
        launch_error.exit_status = failure.exit_status
        raise launch_error
    if job.node or failure.node:  # otherwise rank 0 has logged it
        logger.info(failure.message)
    return failure.exit_status


def run_attempts(supervisor: "Supervisor", coordinator: Coordinator, config: TrainConfig) -> Failure | None:
    """Run attempts until one succeeds or no other is allowed.

    Returns the failure of the last one, or None if it succeeded.
    """
    while True:
        failure = supervisor.run(coordinator)
        if failure is None and coordinator.remote_failure is None:
            failure = coordinator.wait_for_success()
        failure = coordinator.report(failure)
        is_last = supervisor.stop_signal or coordinator.attempt >= config.max_restarts
        if failure is None or not failure.is_retryable or is_last:
            coordinator.leave()
            return failure
        coordinator.start_next_attempt()
        logger.info(f"{failure.message}; restart {coordinator.attempt} of {config.max_restarts}")


class Supervisor:
    """Start the workers of this node, forward signals to them, and end them together.

    Signals that stop a run raise `RunInterrupted` while no workers are running.
    """

    def __init__(self, job: Job, config: TrainConfig, arguments: Sequence[str]) -> None:
        """Install the signal handlers."""
        self.job, self.config, self.arguments = job, config, arguments
        self.launch_id = uuid.uuid4().hex  # of all attempts
        self.stop_signal = 0  # received while workers were running
        self._stop_deadline = math.inf  # monotonic clock
        self._has_workers = False
        self._workers: dict[int, subprocess.Popen] = {}  # by rank
        for number in list_handled_signals():
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._has_workers:
            if number in STOP_SIGNALS and not self.stop_signal:
                self.stop_signal, self._stop_deadline = number, time.monotonic() + self.config.dist_timeout
            self._send(number)
        elif number in STOP_SIGNALS:
            raise RunInterrupted(number)

    def run(self, coordinator: Coordinator) -> Failure | None:
        """Run the workers of one attempt until they end.

        Returns this node's failure, if any. Once a worker failed, on this node or another, the others receive
        SIGTERM, and after a grace period SIGKILL. After a signal to the launcher they have `--dist_timeout`
        seconds to finish the step and save.
        """
        members = coordinator.register()
        grace = 0
        self._has_workers = True
        with tempfile.TemporaryDirectory() as directory:  # not in the run directory: its disk may be full
            try:
                self._start(members, coordinator, Path(directory))
                wait_until(lambda: self._is_ending(coordinator), math.inf)
                failures = self._read_failures(Path(directory))
                remote = coordinator.remote_failure
                is_remote_stop = remote is not None and remote.is_stop and not failures
                grace = self.config.dist_timeout if is_remote_stop else GRACE_SECONDS
            finally:
                self._terminate(grace)
                self._has_workers = False
        if self.stop_signal and any(process.returncode for process in self._workers.values()):
            failures.append(describe_failure(Failure.from_exit_code(-self.stop_signal), self.job))
        return min(failures, key=lambda failure: failure.order, default=None)

    def _start(self, members: list[Member], coordinator: Coordinator, directory: Path) -> None:
        environment = self._make_environment(members, coordinator)
        first_rank = sum(member.processes for member in members[: self.job.node])
        self._workers = {}
        # Workers inherit that SIGUSR1 is blocked, and receive it once they have a handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        command = [sys.executable, "-m", "DeBERTa.train", *self.arguments]
        for local_rank in range(self.job.processes):
            rank = first_rank + local_rank
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            environment[worker.FAILURE_FILE] = str(directory / f"{rank}.json")
            self._workers[rank] = subprocess.Popen(command, env=environment, stderr=sys.stderr)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        if self.stop_signal:  # received meanwhile
            self._send(self.stop_signal)

    def _make_environment(self, members: list[Member], coordinator: Coordinator) -> dict[str, str]:
        """Return the variables of all workers of this node, and log their start."""
        job, environment = self.job, dict(os.environ)
        if interface := find_interface(self._choose_target(members)):
            if job.nodes == 1:  # the loopback interface, whatever is set for runs on several nodes
                environment["GLOO_SOCKET_IFNAME"] = interface
                environment.setdefault("NCCL_SOCKET_IFNAME", interface)
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        threads = ""
        if job.processes > 1 and "OMP_NUM_THREADS" not in environment:
            environment["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // job.processes, 1))
            threads = f" with OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} each (none was set)"
        hosts = ", ".join(member.host for member in members)
        where = f"node {job.node} of {job.nodes} ({hosts})" if job.nodes > 1 else "this node"
        number = f"{job.processes} process{'es' if job.processes > 1 else ''}"
        logs = worker.get_log_path(self.config.run_dir, 0).parent
        logger.info(f"{where}: starting {number}{threads}; logs in {logs}")
        return environment | {
            "WORLD_SIZE": str(sum(member.processes for member in members)),
            "LOCAL_WORLD_SIZE": str(job.processes),
            "GROUP_RANK": str(job.node),
            "GROUP_WORLD_SIZE": str(job.nodes),
            "MASTER_ADDR": job.address,
            "MASTER_PORT": str(coordinator.port),
            worker.LAUNCHER_PID: str(os.getpid()),
            worker.LAUNCH_ID: self.launch_id,
            worker.RESTART_COUNT: str(coordinator.attempt),
        }

    def _choose_target(self, members: list[Member]) -> str:
        """Return the address to which other nodes' messages leave this node.

        Node 0 looks towards another node: its own name may stand for 127.0.1.1 there.
        """
        others = (member.address for member in members[1:] if self.job.node == 0)
        return next((each for each in others if each and not is_loopback(each)), self.job.address)

    def _is_ending(self, coordinator: Coordinator) -> bool:
        """Return whether all workers have ended, or the running ones must end."""
        codes = [process.poll() for process in self._workers.values()]
        if None not in codes:
            return True
        if self.stop_signal:
            return time.monotonic() > self._stop_deadline
        # A worker that was stopped by a signal has all others stop after the step, perhaps after a save.
        has_failed = any(code and not get_stop_signal(code) for code in codes)
        return has_failed or coordinator.remote_failure is not None

    def _read_failures(self, directory: Path) -> list[Failure]:
        return [
            describe_failure(
                Failure.from_exit_code(process.returncode, directory / f"{rank}.json"),
                self.job,
                f"rank {rank}",
                worker.get_log_path(self.config.run_dir, rank),
            )
            for rank, process in self._workers.items()
            if process.poll()
        ]

    def _send(self, number: int) -> None:
        for process in self._workers.values():
            process.send_signal(number)

    def _terminate(self, grace: float) -> None:
        """Send SIGTERM to the workers that still run, and SIGKILL after `grace` seconds."""
        self._send(signal.SIGTERM)
        wait_until(lambda: all(p.poll() is not None for p in self._workers.values()), grace)
        self._send(signal.SIGKILL)
        for process in self._workers.values():
            process.wait()


def describe_failure(failure: Failure, job: Job, rank: str = "", log: Path | None = None) -> Failure:
    """Return the failure with a message that states where it occurred."""
    node = f"node {job.node} ({socket.gethostname()})"
    if failure.is_stop:
        message = f"{failure.message} on {node}; the same command resumes from the last checkpoint"
    elif failure.is_explained:
        message = f"{node}: {failure.message}" if job.nodes > 1 else failure.message
    else:
        message = f"{f'{node}, ' if job.nodes > 1 else ''}{rank}: {failure.message}; its log: {log}"
    return replace(failure, message=message, node=job.node)
