"""The same command on every node: from the node's variables to one process a device, by torch's elastic agent.

What a user exports on each node: WORLD_SIZE, the number of nodes; RANK, this node's number; MASTER_ADDR and
MASTER_PORT, where node 0 can be reached. What each process gets from the agent, under the same names: the number of
*processes*, and its own number among them.

The nodes talk through a key-value store that node 0 keeps: who is there, and who failed. A run is a number of attempts,
more than one with `--max_restarts`; each begins with a roll call.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from DeBERTa.config import TrainConfig
from DeBERTa.errors import ConfigError, PeerLostError
from DeBERTa.training.distributed import is_worker, log_path
from DeBERTa.training.network import interface_towards
from DeBERTa.training.nodes import GRACE_SECONDS, POLL_SECONDS, Failure, Job, Nodes

STOPPED = (
    128 + signal.SIGTERM,
    128 + signal.SIGINT,
)  # exit status of a process that was told to stop, and did
MENDABLE = (
    PeerLostError.__name__,
    "DataWorkerError",
    "",
)  # what another attempt may get past; "": the process was killed


def find_job(config: TrainConfig) -> Job | None:
    """What to start on this node; None when this process is to do the work itself.

    That is so when it was started by an elastic agent (ours or torchrun's), and when one process on one node is wanted.
    Raises `ConfigError` for variables and flags that cannot work.
    """
    if is_worker():
        return None
    nodes, node = _whole_number("WORLD_SIZE", 1), _whole_number("RANK", 0)
    if nodes < 1:
        raise ConfigError(
            f"WORLD_SIZE is {nodes}, but it is the number of nodes: export 1 or more, or unset it"
        )
    if not 0 <= node < nodes:
        raise ConfigError(
            f"RANK is {node} and WORLD_SIZE {nodes}: RANK is the number of this node, from 0 to WORLD_SIZE - 1"
        )
    gpus = torch.cuda.device_count()
    processes = config.nproc_per_node or gpus or 1
    if gpus and processes > gpus:
        raise ConfigError(
            f"--nproc_per_node {processes}: this node has {gpus} GPUs, and each process needs one"
        )
    if nodes == 1:
        return Job(1, 0, "127.0.0.1", 0, processes) if processes > 1 else None
    address, port = os.environ.get("MASTER_ADDR", ""), _whole_number("MASTER_PORT", 0)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise ConfigError(
                f"WORLD_SIZE is {nodes}, but {name} is not set: export MASTER_ADDR and MASTER_PORT, "
                "where node 0 can be reached, on every node"
            )
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}: export a port from 1 to 65535 that is free on node 0")
    return Job(nodes, node, address, port, processes)


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, which is not a whole number") from None


def launch(job: Job, config: TrainConfig, arguments: Sequence[str]) -> int:
    """Start this node's processes and see them through; returns the exit status of the command on this node.

    0 when all of them succeeded, 130 or 143 when the run was stopped by a signal. Raises `ConfigError` when the nodes
    do not come together, or in the sentence of the process that failed.
    """
    logging.disable(logging.CRITICAL)  # the agent's messages: what matters is said here, in one sentence
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there are processes that it can be passed on to
    folder = log_path(config.run_dir, 0).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(folder / f"node-{job.node:04d}.log")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; give another --output_dir") from None
    said = _set_environment(job)
    nodes = None
    try:
        nodes = Nodes(job, config.dist_timeout)
        while True:
            hosts = nodes.roll_call()
            where = f"node {job.node} of {job.nodes} ({', '.join(hosts)})" if job.nodes > 1 else "this node"
            number = f"{job.processes} process{'es' if job.processes > 1 else ''}"
            console.say(f"{where}: starting {number}{said}; logs in {folder}")
            failures = run_attempt(nodes, config, arguments, console)
            if not failures and nodes.failure is None:
                return 0
            failure = nodes.agree(explain(failures, job, config))
            if failure.mendable and nodes.attempt < config.max_restarts:
                nodes.next_attempt()
                console.say(f"{failure.sentence}; restart {nodes.attempt} of {config.max_restarts}")
                continue
            nodes.leave()
            if failure.status == 1:
                raise ConfigError(failure.sentence)
            if failure.node != job.node:
                console.say(failure.sentence)
            return failure.status
    except SignalException as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # nothing runs here any more; the others have to be told
        status = 128 + stop.sigval
        nodes.agree(stopped(status, job))
        nodes.leave()
        return status
    except KeyboardInterrupt:  # before there are processes
        return 128 + signal.SIGINT
    except dist.DistError:
        raise ConfigError(f"node 0 ({job.address}) is gone; its own messages say why") from None
    finally:
        if nodes is not None:
            nodes.close()
        console.close()


class Console:
    """The terminal, kept from the native libraries, whose messages about lost connections go to a log."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("a", buffering=1)
        self._terminal = os.dup(2)
        os.dup2(self._log.fileno(), 2)

    def say(self, text: str) -> None:
        os.write(self._terminal, f"{text}\n".encode())

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Processes started meanwhile write to the terminal."""
        os.dup2(self._terminal, 2)
        try:
            yield
        finally:
            os.dup2(self._log.fileno(), 2)

    def close(self) -> None:
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        self._log.close()


def _set_environment(job: Job) -> str:
    """What the processes inherit, unless the user has set it; returns what to tell of it."""
    interface = interface_towards(job.address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if job.processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(torch.get_num_threads() // job.processes, 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        return f" with OMP_NUM_THREADS={threads} each (none was set)"
    return ""


def run_attempt(
    nodes: Nodes, config: TrainConfig, arguments: Sequence[str], console: Console
) -> dict[int, ProcessFailure]:
    """Start this node's processes and wait until all have succeeded, or some have failed and the others have ended.

    Returns those that failed, by rank, without those that were ended for it. Told to stop by a signal, all get
    `--dist_timeout` seconds to finish the step and save; then `SignalException` is raised.
    """
    job = nodes.job
    if nodes.attempt and config.fresh:  # what this run has saved by now is to be gone on with
        arguments = [*arguments, "--fresh", "False"]
    rendezvous = StaticTCPRendezvous(
        job.address, nodes.port, job.node, job.nodes, f"attempt-{nodes.attempt}", config.dist_timeout
    )
    spec = WorkerSpec(
        role="train",
        local_world_size=job.processes,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        args=("-m", "DeBERTa.train", *arguments),
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
    )
    with tempfile.TemporaryDirectory() as errors:  # not in the run's folder: its disk may be full
        agent = NodeAgent(spec, RankLogs(config.run_dir, Path(errors)), nodes, config.dist_timeout, console)
        result = agent.run()
    return {rank: failure for rank, failure in result.failures.items() if failure.pid in agent.failed}


class NodeAgent(LocalElasticAgent):
    """Torch's agent, which ends its processes soon after one of them, or another node, has failed."""

    def __init__(
        self, spec: WorkerSpec, logs: LogsSpecs, nodes: Nodes, patience: int, console: Console
    ) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=patience, shutdown_timeout=patience)
        self.nodes, self.patience, self.console = nodes, patience, console
        self.failed: list[int] = []  # ids of the processes that failed before the others were ended

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        # They inherit that SIGUSR1 is blocked, and answer it once they can.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            with self.console.shared():
                started = super()._start_workers(worker_group)
            signal.signal(signal.SIGUSR1, self._pass_on)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        return started

    def _processes(self) -> list[subprocess.Popen]:
        return [handler.proc for handler in self._pcontext.subprocess_handlers.values()]

    def _pass_on(self, number: int, _frame: object) -> None:
        for process in self._processes():
            process.send_signal(number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        processes = self._processes()
        self.failed = [process.pid for process in processes if process.poll()]
        stopping = any(process.returncode in STOPPED for process in processes)
        running = any(process.returncode is None for process in processes)
        if stopping and running and all(process.returncode in (None, 0, *STOPPED) for process in processes):
            return RunResult(
                state=WorkerState.HEALTHY
            )  # the others are about to stop too, perhaps after a save
        failure = self.nodes.failure
        if self.failed or failure is not None:
            told_to_stop = not self.failed and failure.status in STOPPED
            self._pcontext.close(timeout=self.patience if told_to_stop else GRACE_SECONDS)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and not self.failed and self.nodes.failure is None:
            self.failed = [
                failure.pid for failure in result.failures.values()
            ]  # failed since they were asked above
        return result


class RankLogs(LogsSpecs):
    """Processes write their logs themselves; here is only where they leave the error that ended them."""

    def __init__(self, run_dir: Path, errors: Path) -> None:
        super().__init__()
        self.run_dir, self.errors = run_dir, errors

    @property
    def root_log_dir(self) -> str:
        return str(log_path(self.run_dir, 0).parent)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        errors = {}
        for local_rank, environment in envs.items():
            path = self.errors / f"{local_rank}.json"
            errors[local_rank] = environment["TORCHELASTIC_ERROR_FILE"] = str(path)
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=console, error_files=errors)


def explain(failures: dict[int, ProcessFailure], job: Job, config: TrainConfig) -> Failure | None:
    """What happened to this node's processes, in one sentence: to the one that failed, not to those that lost it."""
    if not failures:
        return None
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode in STOPPED]
    failures = {rank: failure for rank, failure in failures.items() if failure.exitcode not in STOPPED}
    if codes and all(map(_is_loss, failures.values())):
        return stopped(max(codes), job)
    rank, failure = min(failures.items(), key=lambda item: (_is_loss(item[1]), item[1].timestamp))
    kind, sentence = _recorded(failure)
    where = f"node {job.node} ({socket.gethostname()}), rank {rank}" if job.nodes > 1 else f"rank {rank}"
    if failure.exitcode < 0:
        sentence = f"was ended by {signal.Signals(-failure.exitcode).name}"
    elif not kind:
        sentence = f"ended with exit status {failure.exitcode}"
    if kind not in TOLD:
        sentence = f"{where}: {sentence}; its log: {log_path(config.run_dir, rank)}"
    elif job.nodes > 1:
        sentence = f"node {job.node} ({socket.gethostname()}): {sentence}"
    return Failure(sentence, job.node, kind in MENDABLE, not _is_loss(failure))


TOLD = (
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "VocabularyError",
    "NonFiniteError",
    "StorageError",
    "DataWorkerError",
)  # sentences for people as they are


def stopped(status: int, job: Job) -> Failure:
    """The end of a run that was told to stop: not a failure, but the other nodes may take it for one."""
    sentence = f"stopped by {signal.Signals(status - 128).name} on node {job.node} ({socket.gethostname()})"
    sentence += "; the same command goes on from the last checkpoint"
    return Failure(sentence, job.node, mendable=False, is_cause=True, status=status)


def _recorded(failure: ProcessFailure) -> tuple[str, str]:
    """Kind and sentence of the error that the process left; empty when it left none."""
    message = failure.error_file_data["message"]
    if isinstance(message, str):
        return "", ""
    kind, _, sentence = message["message"].partition(": ")
    return kind, sentence


def _is_loss(failure: ProcessFailure) -> bool:
    return _recorded(failure)[0] == PeerLostError.__name__
