"""Two machines on one: network namespaces with host names of their own, joined by a veth pair.

Needs root, and the programs of Debian's packages iproute2, util-linux and, for lossy links, iptables.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
numbers = itertools.count()  # of the pairs that this process has made
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "iptables": "iptables"}


class TwoNodes:
    """`node0` and `node1`, by the names that they resolve; `start` runs a command on one of them."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}-{node}" for node in (0, 1)]
        self.started: list[subprocess.Popen] = []

    def start(self, node: int, command: list, log: Path, **environment: str) -> subprocess.Popen:
        """Run on a node, stderr and stdout to `log`; a signal to the process reaches the command."""
        script = f'hostname node{node}; exec "$@"'
        enter = ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", script, "sh"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*enter, *map(str, command)],
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, node: int, *command: str) -> str:
        """Return what a short command on a node prints; it must succeed."""
        return run_command("ip", "netns", "exec", self.names[node], *command)

    def list_processes(self, node: int) -> list[int]:
        """Return the ids of all processes on a node."""
        return [int(pid) for pid in run_command("ip", "netns", "pids", self.names[node]).split()]

    def cut(self) -> None:
        """Drop all packets between the nodes, without an error."""
        for node in (0, 1):
            for chain in ("INPUT", "OUTPUT"):
                self.run(
                    node, "iptables", "-A", chain, "!", "-i" if chain == "INPUT" else "-o", "lo", "-j", "DROP"
                )

    def reconnect(self) -> None:
        """Undo `cut`."""
        for node in (0, 1):
            self.run(node, "iptables", "-F")

    def drop(self, share: float) -> None:
        """Drop that share of the arriving packets, at random."""
        for node in (0, 1):
            rule = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
            self.run(node, "iptables", "-A", "INPUT", "!", "-i", "lo", *rule)

    def limit(self, rate: str) -> None:
        """Send no faster than `rate`, as tc writes it."""
        for node in (0, 1):
            shape = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
            self.run(node, "tc", "qdisc", "add", "dev", "eth0", "root", *shape)


@contextmanager
def open_two_nodes(*programs: str) -> Iterator[TwoNodes]:
    """Create the nodes and remove them, with their processes. Fails where that is not permitted."""
    for program in ("ip", "unshare", *programs):
        if shutil.which(program) is None:
            pytest.fail(f"the program {program} is missing: apt-get install {PROGRAMS[program]}")
    nodes = TwoNodes(f"deberta-{os.getpid()}-{next(numbers)}")
    try:
        _connect(nodes)
        yield nodes
    finally:
        for name in nodes.names:
            _kill_all(name)
        for process in nodes.started:
            process.wait()
        for name in nodes.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _kill_all(name: str) -> None:
    """Kill all processes in a namespace, until none is left that was started meanwhile."""
    list_all = ["ip", "netns", "pids", name]
    while pids := subprocess.run(list_all, capture_output=True, text=True, check=False).stdout.split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _connect(nodes: TwoNodes) -> None:
    hosts = "127.0.0.1 localhost\n" + "".join(f"{address} node{n}\n" for n, address in enumerate(ADDRESSES))
    for name in nodes.names:
        run_command("ip", "netns", "add", name)
        folder = Path("/etc/netns") / name  # `ip netns exec` puts these files over those in /etc
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(hosts)
        (folder / "resolv.conf").write_text("")
    first, second = nodes.names
    run_command(
        "ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second
    )
    for name, address in zip(nodes.names, ADDRESSES, strict=True):
        run_command("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        run_command("ip", "-n", name, "link", "set", "eth0", "up")
        run_command("ip", "-n", name, "link", "set", "lo", "up")


def run_command(*command: str) -> str:
    """Return the output of a system command; the test fails if it is not permitted."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(f"{' '.join(command)}: {result.stderr.strip()} (network namespaces need root)")
    return result.stdout
