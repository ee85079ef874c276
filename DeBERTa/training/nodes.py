"""Coordination of nodes: registration with node 0, failures and completion.

Nodes exchange these through the key-value store (c10d's TCPStore) that the launcher of node 0 serves at
MASTER_ADDR:MASTER_PORT. A run consists of attempts, more than one with `--max_restarts`. Each attempt uses
keys of its own.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed as dist

from DeBERTa.errors import LaunchError
from DeBERTa.training.network import describe_silence, find_own_address, wait_for_host
from DeBERTa.training.worker import STORE_THREAD, Failure

POLL_SECONDS = 0.1
GRACE_SECONDS = 5  # for workers to end after a failure, and for nodes to read it
LONGEST_MESSAGE = 2000
FOREIGN = (
    "the store of node 0 holds what no node of a run writes: another program uses MASTER_PORT; export an "
    "unused one, on a network of your own"
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Workers of a run on this node: `processes` workers on node `node` of `nodes`."""

    nodes: int
    node: int
    address: str  # of node 0
    port: int
    processes: int


@dataclass(frozen=True)
class Member:
    """Values that a node publishes when it registers."""

    host: str
    nodes: int  # its WORLD_SIZE
    processes: int
    token: str  # differs between nodes with the same RANK
    address: str  # its own, towards node 0; "" if there is none

    @staticmethod
    def from_json(text: bytes) -> "Member":
        """Read what a node published.

        Raises `LaunchError` for anything else.
        """
        try:
            member = Member(**json.loads(text))
            is_valid = all(isinstance(n, int) and 0 < n < 2**20 for n in (member.nodes, member.processes))
            is_valid &= isinstance(member.address, str)
        except (ValueError, TypeError, RecursionError):
            is_valid = False
        if not is_valid:
            raise LaunchError(FOREIGN)
        return replace(member, host=_shorten(str(member.host)))


class Coordinator:
    """One node's access to the store of node 0, for one attempt at a time."""

    def __init__(self, job: Job, timeout: int) -> None:
        """Serve the store, or connect to it.

        The store of a run on one node listens on the loopback interface alone. Raises `LaunchError` if the
        port is taken, or unreachable for `timeout` seconds.
        """
        self.job, self.timeout, self.port = job, timeout, job.port
        self._is_answering = True
        self._is_over = threading.Event()  # ends the watcher of an attempt
        wait_for_host(job.address, timeout if job.node else 0)
        # Bounded: the connection waits forever for a server that sends nothing.
        root = self._serve() if job.node == 0 else self._call(self._connect, timeout)
        if root is None:
            raise LaunchError(describe_silence(job.address, job.port, timeout))
        self._root, self.port = root, root.port
        self._enter_attempt()

    def _serve(self) -> dist.TCPStore:
        address, port, listener = self.job.address, self.job.port, None
        if self.job.nodes == 1:
            listener = socket.create_server((address, port))
            port = listener.getsockname()[1]
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.timeout),
                master_listen_fd=listener.detach() if listener else None,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise LaunchError(
                    f"port {port} of this node is in use, by another command with RANK 0 or another program: "
                    "end it, or export another MASTER_PORT on every node"
                ) from None
            raise LaunchError(
                f"RANK is 0, but this node cannot be reached as MASTER_ADDR {address}: "
                "export the address of the node with RANK 0"
            ) from None
        store.set("attempt", "0")
        return store

    def _connect(self) -> dist.TCPStore:
        store = dist.TCPStore(self.job.address, self.port, timeout=timedelta(seconds=self.timeout))
        store.wait(["attempt"])
        return store

    def _enter_attempt(self) -> None:
        attempt = self._root.get("attempt")
        if not attempt.isdigit():
            raise LaunchError(FOREIGN)
        self.attempt = int(attempt)
        self._store = dist.PrefixStore(f"attempt-{self.attempt}", self._root)
        self._members: dict[int, Member] = {}  # by node
        self.remote_failure: Failure | None = None  # published by another node

    def register(self) -> list[Member]:
        """Register this node and wait for all others.

        Returns the members by node number. Raises `LaunchError` if one does not register in time, or if RANK
        or WORLD_SIZE do not fit together.
        """
        job = self.job
        address = find_own_address(job.address) or ""
        own = Member(socket.gethostname(), job.nodes, job.processes, uuid.uuid4().hex, address)
        first = Member.from_json(self._store.compare_set(f"node-{job.node}", "", json.dumps(asdict(own))))
        if first != own:
            self._refuse(f"two nodes have RANK {job.node}: {first.host} and {own.host}")
        if not wait_until(self._is_complete, self.timeout):
            missing = ", ".join(str(node) for node in range(job.nodes) if node not in self._members)
            self._refuse(
                f"no node with RANK {missing} registered within --dist_timeout {self.timeout} s: start the "
                f"same command there with WORLD_SIZE={job.nodes}"
            )
        self._store.set("complete", "")
        self._is_over.clear()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name=STORE_THREAD)
        self._watcher.start()
        return [self._members[node] for node in range(job.nodes)]

    def _is_complete(self) -> bool:
        """Return whether all nodes have registered, and read their members.

        Raises `LaunchError` if one of them cannot start.
        """
        job = self.job
        for node in range(job.nodes):
            if node not in self._members and self._store.check([f"node-{node}"]):
                member = self._members[node] = Member.from_json(self._store.get(f"node-{node}"))
                if member.nodes != job.nodes:
                    self._refuse(
                        f"WORLD_SIZE is {member.nodes} on node {node} and {job.nodes} on node {job.node}: "
                        "export the same number on every node"
                    )
        if self._store.check(["failure"]):
            self.leave()
            raise LaunchError(read_failure(self._store.get("failure")).message)
        return len(self._members) == job.nodes

    def _refuse(self, message: str) -> NoReturn:
        """End the registration of all nodes with `LaunchError`.

        If the others are complete without this node, only its own registration ends.
        """
        if not self._store.check(["complete"]):
            self._publish(Failure(message, node=self.job.node))
            self.leave()
        raise LaunchError(message)

    def _watch(self) -> None:
        """Set `remote_failure` once a failure is published.

        Runs in a thread, over a connection of its own.
        """
        try:
            store = dist.PrefixStore(f"attempt-{self.attempt}", self._connect())
            while not self._is_over.wait(POLL_SECONDS):
                if store.check(["failure"]):
                    self.remote_failure = read_failure(store.get("failure"))
                    return
        except dist.DistError:
            # Node 0 leaves first at the end of a run, too. This node's own end counts then.
            if not self._is_over.wait(GRACE_SECONDS):
                self.remote_failure = Failure(describe_loss(self.job), is_consequence=True)

    def report(self, failure: Failure | None) -> Failure | None:
        """Publish this node's failure, if any.

        Returns the failure that explains the end of the attempt, if any. A consequence is published only if
        no other node publishes its cause within `GRACE_SECONDS`.
        """
        if failure is None:
            return self.remote_failure
        if failure.is_consequence and self.job.nodes > 1:
            wait_until(lambda: self.remote_failure is not None, GRACE_SECONDS)
        first = self.remote_failure or self._publish(failure)
        return failure if first.is_consequence and not failure.is_consequence else first

    def _publish(self, failure: Failure) -> Failure:
        """Publish a failure and return the one that was published first.

        Returns `failure` itself if node 0 does not respond.
        """
        stored = self._call(lambda: self._store.compare_set("failure", "", failure.to_json()))
        return failure if stored is None else read_failure(stored)

    def wait_for_success(self) -> Failure | None:
        """Wait until the workers of all nodes have succeeded.

        Returns the failure of another node, if any.
        """
        self._call(lambda: self._store.add("succeeded", 1))
        wait_until(lambda: self.remote_failure is not None or self._has_all("succeeded"), self.timeout)
        return self.remote_failure

    def _has_all(self, name: str) -> bool:
        """Return whether all registered nodes have incremented a counter.

        Also true if node 0 has left.
        """
        count = self._call(lambda: self._store.add(name, 0))
        return count is None or count >= len(self._members)

    def start_next_attempt(self) -> None:
        """Enter the next attempt, or the one that other nodes have already started."""
        current, following = str(self.attempt), str(self.attempt + 1)
        if self._call(lambda: self._root.compare_set("attempt", current, following)) is None:
            raise LaunchError(describe_loss(self.job))
        self._is_over.set()
        self._watcher.join()
        self._enter_attempt()

    def leave(self) -> None:
        """Add this node to those that have left.

        Node 0 waits up to `GRACE_SECONDS`, so that the others can read the result.
        """
        if not self._members:  # another node has this RANK
            return
        self._call(lambda: self._store.add("left", 1))
        if self.job.node == 0:
            wait_until(lambda: self._has_all("left"), GRACE_SECONDS)

    def _call(self, function: Callable[[], Result], seconds: float = GRACE_SECONDS) -> Result | None:
        """Return `function()`, or None if node 0 does not respond within `seconds`.

        Returns None if node 0 has left, too.
        """
        results: list[Result] = []

        def run() -> None:
            with suppress(dist.DistError):
                results.append(function())

        if self._is_answering:
            thread = threading.Thread(target=run, daemon=True, name=STORE_THREAD)
            thread.start()
            thread.join(seconds)
            self._is_answering = not thread.is_alive()
        return results[0] if results else None


def read_failure(text: bytes) -> Failure:
    """Return a published failure with a message of one line."""
    failure = Failure.from_json(text)
    return replace(failure, message=_shorten(failure.message))


def _shorten(text: str) -> str:
    """Return what another machine sent, shortened, as one line.

    It has at most `LONGEST_MESSAGE` characters.
    """
    return " ".join(text.split())[:LONGEST_MESSAGE]


def describe_loss(job: Job) -> str:
    """Return the message for a store that can no longer be reached."""
    return f"node 0 ({job.address}) is gone: see its own messages"


def wait_until(is_true: Callable[[], bool], seconds: float) -> bool:
    """Wait until `is_true()`, and return whether it was true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
