"""The README's example of several nodes on two machines with network stacks of their own.

It is changed in nothing but its length, what it logs, and that it computes in float32 on CPUs with bfloat16,
too.

Four processes and one differ by rounding, in losses by 1e-7, until the generator draws another token
somewhere (tests/draws.py, docs/distributed.md). Which runs that happens to depends on the processor. So the
draws that differ are counted, and losses are compared with the draws of one process given to the four.

Needs root and Debian's iproute2, util-linux and iptables; where these are missing or namespaces are not
permitted, the tests fail and say so. The data is prepared once, by the first run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, strip_times
from tests.draws import count_differences, read_draws
from tests.nodes import TwoNodes, open_two_nodes
from tests.runs import build_arguments, tiny_flags

STEPS = 20
EXAMPLE = ["./rtd.sh", "deberta-v3-tiny"]
# A batch of 48 has draws enough to count those that differ.
FLAGS = ["--num_training_steps", STEPS, "--log_interval", 1, "--precision", "fp32", "--train_batch_size", 48]
PATIENCE = 900  # seconds
MOST_DIFFERENT = 180  # draws, 1 %: they differ by chance, in proportion to vocabulary size and rounding


def make_environment(folder: Path) -> dict[str, str]:
    """Return variables: this Python first on the path, one cache for all runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    replay = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "replay_draws")])
    variables = {"PATH": path, "DEBERTA_CACHE": str(folder / "cache"), "PYTHONPATH": replay}
    return variables | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # per rank


class Cluster:
    """The same command on both nodes, each with a disk of its own for run directories."""

    def __init__(self, nodes: TwoNodes, folder: Path, shared: dict[str, str]) -> None:
        self.nodes, self.folder, self.shared = nodes, folder, shared

    def start(self, alone: "Alone", *flags: object) -> None:
        where = {"DRAWS_GIVEN": str(alone.draws), "DRAWS_RECORD": str(self.folder / "draws")}
        where |= {"WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
        self.processes = [
            self.nodes.start(
                node,
                [
                    *EXAMPLE,
                    "--nproc_per_node",
                    2,
                    "--output_dir",
                    self.folder / f"node{node}",
                    *FLAGS,
                    *flags,
                ],
                self.get_printed(node),
                **self.shared,
                **where,
                RANK=str(node),
            )
            for node in (0, 1)
        ]

    def get_printed(self, node: int) -> Path:
        return self.folder / f"node{node}.printed"

    def finish(self) -> list[int]:
        return [process.wait(timeout=PATIENCE) for process in self.processes]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.get_printed(0).read_text()
            assert time.monotonic() < deadline, self.get_printed(0).read_text()
            time.sleep(0.05)

    def assert_same(self, alone: "Alone") -> None:
        """Compare losses with the draws given, and count the own draws that differ."""
        found = read_losses(self.folder / "node0")
        assert [line["step"] for line in found] == list(range(1, STEPS + 1))
        for ours, theirs in zip(found, read_losses(alone.run_dir), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        different, total = count_differences(read_draws(alone.draws), read_draws(self.folder / "draws"))
        print(f"{different} of {total} draws differ")
        assert different <= MOST_DIFFERENT
        assert total > 10_000


class Alone(NamedTuple):
    """A run of one process with the same global batch."""

    run_dir: Path
    draws: Path


def read_losses(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "generator_loss", "discriminator_loss")
    return [{name: line[name] for name in names} for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


def run_alone(folder: Path, name: str, *flags: object) -> Alone:
    alone = Alone(folder / name, folder / f"{name}-draws")
    command = [*EXAMPLE, "--output_dir", folder / name, *FLAGS, *flags]
    subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | make_environment(folder) | {"DRAWS_RECORD": str(alone.draws)},
        check=True,
        capture_output=True,
    )
    return alone


@pytest.fixture(scope="module")
def alone(shared) -> Alone:
    return run_alone(shared, "alone")


@pytest.fixture
def cluster(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with open_two_nodes("iptables", "tc") as nodes:
        yield Cluster(nodes, tmp_path, make_environment(shared))


def test_readme_example_learns_as_one_process_does(cluster, alone):
    cluster.start(alone)
    assert cluster.finish() == [0, 0], cluster.get_printed(0).read_text() + cluster.get_printed(1).read_text()
    cluster.assert_same(alone)
    assert "4 processes on 2 nodes" in cluster.get_printed(0).read_text()
    assert (cluster.folder / "node0" / "discriminator" / "model.safetensors").exists()
    assert sorted(path.name for path in (cluster.folder / "node1").iterdir()) == ["logs"]
    logs = [path.name for path in (cluster.folder / "node1" / "logs").glob("rank-*")]
    assert sorted(logs) == ["rank-0002.log", "rank-0003.log"]
    assert "step 20/" not in cluster.get_printed(1).read_text()
    assert cluster.nodes.list_processes(0) == cluster.nodes.list_processes(1) == []


def test_another_seed(cluster, shared):
    alone = run_alone(shared, "another", "--seed", 1)
    cluster.start(alone, "--seed", 1)
    assert cluster.finish() == [0, 0], cluster.get_printed(0).read_text() + cluster.get_printed(1).read_text()
    cluster.assert_same(alone)


def test_a_slow_link_that_loses_packets_changes_nothing(cluster, alone):
    cluster.nodes.drop(0.05)
    cluster.nodes.limit("200mbit")
    cluster.start(alone)
    assert cluster.finish() == [0, 0], cluster.get_printed(0).read_text() + cluster.get_printed(1).read_text()
    cluster.assert_same(alone)
    dropped = cluster.nodes.run(0, "iptables", "-nvxL", "INPUT").splitlines()[2].split()
    assert int(dropped[0]) > 100  # packets


def test_a_cut_link_ends_both_sides_and_the_same_command_resumes(cluster, alone):
    cluster.start(alone, "--dump_interval", 5, "--dist_timeout", 40)
    log = cluster.get_printed(0)
    cluster.wait_for(lambda: "step 6/" in log.read_text())
    cluster.nodes.cut()
    cut = time.monotonic()
    assert cluster.finish() == [1, 1]
    assert time.monotonic() - cut < 40 + 15  # of a loaded machine
    for node in (0, 1):
        lines = strip_times(cluster.get_printed(node).read_text()).splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in "".join(lines)
        assert cluster.nodes.list_processes(node) == []
    assert "--dist_timeout 40 s" in cluster.get_printed(0).read_text()
    cluster.nodes.reconnect()
    cluster.start(alone, "--dump_interval", 5, "--dist_timeout", 60)
    assert cluster.finish() == [0, 0], cluster.get_printed(0).read_text() + cluster.get_printed(1).read_text()
    assert "resuming from step 5" in cluster.get_printed(0).read_text()
    cluster.assert_same(alone)


def test_a_host_whose_name_stands_for_127_0_1_1(tmp_path, prepared, monkeypatch):
    """As on Debian, where node 0 finds its own name in /etc/hosts; addresses are above 127 or below."""
    for network in ("10.77.0", "192.168.77"):
        monkeypatch.setattr("tests.nodes.ADDRESSES", (f"{network}.1", f"{network}.2"))
        flags = tiny_flags(tmp_path, prepared, "MLM") | {"nproc_per_node": 1, "dist_timeout": 60}
        with open_two_nodes() as nodes:
            hosts = Path("/etc/netns") / nodes.names[0] / "hosts"
            hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node0\n")
            processes = [
                nodes.start(
                    node,
                    [sys.executable, "-m", "DeBERTa.train", *build_arguments(flags | {"output_dir": folder})],
                    folder.with_suffix(".printed"),
                    WORLD_SIZE="2", RANK=str(node), MASTER_ADDR="node0", MASTER_PORT="29500",
                )
                for node, folder in enumerate(tmp_path / f"{network}-{node}" for node in (0, 1))
            ]  # fmt: skip
            assert [process.wait(timeout=PATIENCE) for process in processes] == [0, 0]
