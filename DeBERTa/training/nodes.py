"""What the nodes of a run tell each other: who is there, and who failed.

Through a key-value store (c10d's TCPStore) that node 0 keeps at MASTER_ADDR:MASTER_PORT; the processes find each other
there too. Keys begin with the number of the attempt.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from DeBERTa.errors import ConfigError
from DeBERTa.training.network import check_host, wait_for_port

POLL_SECONDS = 0.1
ANSWER_SECONDS = 60  # for the store of node 0, once its port is open
GRACE_SECONDS = 5  # for processes to end after another one failed, and for nodes to hear of it


@dataclass(frozen=True)
class Job:
    """This node's part of a run: `processes` here, on node `node` of `nodes`, which meet at `address`:`port`."""

    nodes: int
    node: int
    address: str
    port: int
    processes: int


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended: one sentence, on which node, whether another attempt may help, the exit status."""

    sentence: str
    node: int
    mendable: bool
    is_cause: bool  # not merely the loss of a process that failed elsewhere
    status: int = 1


class Nodes:
    """What the nodes tell each other, in the store of node 0. One attempt at a time."""

    def __init__(self, job: Job, timeout: int) -> None:
        """Open or reach the store. Raises `ConfigError` when the port is taken, or unreachable for `timeout` s."""
        self.job, self.timeout = job, timeout
        self.failure: Failure | None = None  # set when another node has failed
        self._watching: threading.Thread | None = None
        self._unreachable = False  # the store did not answer
        self.store = self._open()
        self.port = self.store.port
        self.attempt = 0
        if job.node == 0:
            self.store.compare_set("attempt", "", "0")
        else:
            self.attempt = int(self._get("attempt"))

    def _open(self) -> dist.TCPStore:
        job, limit = self.job, timedelta(seconds=self.timeout)
        check_host(job.address)
        if job.node == 0:
            try:
                return dist.TCPStore(
                    job.address,
                    job.port,
                    is_master=True,
                    multi_tenant=True,
                    wait_for_workers=False,
                    timeout=limit,
                )
            except dist.DistNetworkError as error:
                if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                    raise ConfigError(
                        f"port {job.port} of this node is in use, by another command with RANK 0 or another program: "
                        "end it, or export another MASTER_PORT on every node"
                    ) from None
                raise ConfigError(
                    f"RANK is 0, but this node cannot be reached as MASTER_ADDR {job.address}: "
                    "export the address of the node with RANK 0"
                ) from None
        deadline = time.monotonic() + self.timeout
        wait_for_port(job.address, job.port, self.timeout)
        left = deadline - time.monotonic()
        return self._reach(min(max(left, GRACE_SECONDS), ANSWER_SECONDS))

    def _reach(self, seconds: float) -> dist.TCPStore:
        """The store of node 0. Raises `ConfigError` when what listens there is none, or another one.

        In a thread, for with a program that waits for more to be said, the connection would wait for ever.
        """
        reached: list[dist.TCPStore] = []

        def reach() -> None:
            store = self._connect()
            store.wait(["attempt"], timedelta(seconds=seconds))
            reached.append(store)

        self._bounded(reach, seconds)
        if not reached:
            raise ConfigError(
                f"what answers at MASTER_ADDR {self.job.address}, MASTER_PORT {self.job.port} is not the launcher of "
                "node 0: start the command with RANK 0 there, with a MASTER_PORT that no other program has"
            )
        return reached[0]

    def _connect(self) -> dist.TCPStore:
        limit = timedelta(seconds=self.timeout)
        return dist.TCPStore(
            self.job.address, self.port if self.job.node == 0 else self.job.port, timeout=limit
        )

    def roll_call(self) -> list[str]:
        """Wait until every node is there; returns their host names. Raises `ConfigError` when one does not come."""
        job, me = self.job, socket.gethostname()
        self.failure = None
        if self._add(f"rank-{job.node}") > 1:
            sentence = (
                f"two nodes have RANK {job.node}: {self._get(f'{self.attempt}/host-{job.node}')} and {me}"
            )
            if self._there(range(job.nodes)):  # the others are complete without this one
                raise ConfigError(sentence)
            self._refuse(sentence)
        self.store.set(f"{self.attempt}/host-{job.node}", me)
        self.store.set(f"{self.attempt}/nodes-{job.node}", str(job.nodes))
        deadline = time.monotonic() + self.timeout
        complete = False
        while not complete:
            complete = self._there(range(job.nodes))
            if self.store.check([f"{self.attempt}/failure"]):
                self.leave()
                raise ConfigError(json.loads(self._get(f"{self.attempt}/failure"))["sentence"])
            for node in filter(lambda node: self._there([node]), range(job.nodes)):
                size = int(self._get(f"{self.attempt}/nodes-{node}"))
                if size != job.nodes:
                    self._refuse(f"WORLD_SIZE is {size} on node {node} and {job.nodes} on node {job.node}")
            if not complete and time.monotonic() > deadline:
                missing = [str(node) for node in range(job.nodes) if not self._there([node])]
                raise ConfigError(
                    f"no node with RANK {', '.join(missing)} came within --dist_timeout {self.timeout} s: start the "
                    f"same command there with WORLD_SIZE={job.nodes}"
                )
            time.sleep(POLL_SECONDS)
        self.store.set(f"{self.attempt}/complete", "")
        self._watching = threading.Thread(target=self._watch, args=(self.attempt,), daemon=True)
        self._watching.start()
        return [self._get(f"{self.attempt}/host-{node}") for node in range(job.nodes)]

    def _watch(self, attempt: int) -> None:
        """In a thread, over a connection of its own: set `failure` once another node has failed or node 0 is gone."""
        try:
            store = self._connect()
            while self.attempt == attempt and not store.check([f"{attempt}/failure"]):
                time.sleep(POLL_SECONDS)
            if self.attempt == attempt:
                self.failure = Failure(**json.loads(store.get(f"{attempt}/failure")))
        except dist.DistError:
            # Node 0 leaves first when the run has ended, too: this node's own end is what counts then.
            deadline = time.monotonic() + GRACE_SECONDS
            while self.attempt == attempt and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if self.attempt != attempt:
                return
            sentence = f"node 0 ({self.job.address}) is gone; its own messages say why"
            self.failure = Failure(sentence, 0, mendable=False, is_cause=False)

    def agree(self, mine: Failure | None) -> Failure:
        """Tell the others of this node's failure, unless another node's explains it; returns the one that counts.

        `mine` is None when nothing failed here before another node did.
        """
        deadline = time.monotonic() + GRACE_SECONDS
        patient = mine is not None and not mine.is_cause and self.job.nodes > 1
        while self.failure is None and patient and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if mine is not None and (mine.is_cause or self.failure is None):
            self._publish(mine)
            return mine
        return self.failure

    def _publish(self, failure: Failure) -> None:
        """In a thread, with a limit: the store may be unreachable."""
        key, value = f"{self.attempt}/failure", json.dumps(vars(failure))
        self._bounded(lambda: self.store.compare_set(key, "", value))

    def next_attempt(self) -> None:
        """Move on to the attempt after this one, or to where the other nodes are already."""
        before = self.attempt
        self.store.compare_set("attempt", str(before), str(before + 1))
        self.attempt = int(self._get("attempt"))

    def leave(self) -> None:
        """Node 0 stays a little, so that the others can read what happened."""
        self._bounded(lambda: self._add("left"))
        deadline = time.monotonic() + GRACE_SECONDS
        while (
            self.job.node == 0
            and self.job.nodes > 1
            and not self._unreachable
            and time.monotonic() < deadline
        ):
            if self.store.add(f"{self.attempt}/left", 0) >= self.job.nodes:
                return
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End the watching. A thread inside the store when Python ends would abort the process."""
        self.attempt = -1
        if self._watching is not None and not self._unreachable:
            self._watching.join(2 * GRACE_SECONDS)

    def _bounded(self, call: Callable[[], object], seconds: float = GRACE_SECONDS) -> None:
        def quietly() -> None:
            try:
                call()
            except dist.DistError:  # node 0 has left: there is nobody to tell
                return

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(0 if self._unreachable else seconds)
        self._unreachable = thread.is_alive()

    def _refuse(self, sentence: str) -> NoReturn:
        """End the roll call for all nodes; for this one alone where the others are training already."""
        if self.store.check([f"{self.attempt}/complete"]):
            raise ConfigError(sentence)
        self._publish(Failure(sentence, self.job.node, mendable=False, is_cause=True))
        self.leave()
        raise ConfigError(sentence)

    def _there(self, nodes: Sequence[int]) -> bool:
        return self.store.check([f"{self.attempt}/nodes-{node}" for node in nodes])

    def _add(self, name: str) -> int:
        return self.store.add(f"{self.attempt}/{name}", 1)

    def _get(self, key: str) -> str:
        return self.store.get(key).decode()
