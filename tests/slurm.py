"""A Slurm of its own on two nodes: controller and two node daemons, with all their files in one folder.

Needs what `tests/nodes.py` needs, and Debian's package slurm-wlm.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.nodes import TwoNodes, open_two_nodes

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PATIENCE = 900  # seconds
# Without authentication (auth/none, cred/none), which elsewhere takes a munge key.
CONFIGURATION = """
ClusterName=deberta
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=node[0-1] CPUs={cores}
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """Run commands on node 0, in `directory`."""

    def __init__(self, nodes: TwoNodes, folder: Path, directory: Path) -> None:
        self.nodes, self.folder, self.directory = nodes, folder, directory

    def run(self, *command: object) -> str:
        """Return what a command prints, on both streams; it must succeed."""
        log = self.folder / "command.printed"
        process = self.nodes.start(0, [*command], log, **self.environment)
        assert process.wait(PATIENCE) == 0, log.read_text()
        return log.read_text()

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}


class Job:
    """A script submitted by `sbatch`; what it prints goes to a file."""

    def __init__(self, slurm: Slurm, script: Path, *flags: str, **environment: str) -> None:
        self.slurm = slurm
        self.printed = script.with_suffix(".printed")
        self.printed.unlink(missing_ok=True)
        command = [
            "sbatch",
            "--wait",
            "--parsable",
            "--chdir",
            slurm.directory,
            "--output",
            self.printed,
            *flags,
        ]
        log = script.with_suffix(".sbatch")
        self.process = slurm.nodes.start(0, [*command, script], log, **slurm.environment, **environment)
        self.wait_for(log.read_text)
        self.number = int(log.read_text())

    def send_signal(self, *flags: str) -> None:
        self.slurm.run("scancel", *flags, self.number)

    def finish(self) -> int:
        """Return its exit status, that of `sbatch --wait`."""
        return self.process.wait(PATIENCE)

    def record(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in shown.split())

    def end(self) -> str:
        """Return state, status and signal of the script once no process is left: "COMPLETED 0:0"."""
        self.finish()
        deadline = time.monotonic() + PATIENCE
        while (record := self.record())["JobState"] == "COMPLETING":
            assert time.monotonic() < deadline, self.read_text()
            time.sleep(0.1)
        return f"{record['JobState']} {record['ExitCode']}"

    def limit(self, minutes: int) -> None:
        """Let it run between `minutes` - 1 and `minutes` from now."""
        hours, past, _ = map(int, self.record()["RunTime"].split(":"))
        self.slurm.run(
            "scontrol", "update", f"JobId={self.number}", f"TimeLimit={60 * hours + past + minutes}"
        )

    def read_text(self) -> str:
        return self.printed.read_text() if self.printed.exists() else ""

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.read_text()
            assert time.monotonic() < deadline, self.read_text()
            time.sleep(0.05)


@contextmanager
def start_slurm(folder: Path, directory: Path, *programs: str) -> Iterator[Slurm]:
    """Start it and end it, with all jobs. Fails where Debian's package slurm-wlm is missing."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            pytest.fail(f"the program {program} is missing: apt-get install slurm-wlm")
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, cores=os.cpu_count()))
    # Not used, but initialized by slurmd; version 2 needs mounts, and a namespace has none.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", "spool-node0", "spool-node1"):
        (folder / name).mkdir()
    with open_two_nodes(*programs) as nodes:
        found = Slurm(nodes, folder, directory)
        nodes.start(0, ["slurmctld", "-D"], folder / "slurmctld.log", **found.environment)
        for node in (0, 1):
            nodes.start(node, ["slurmd", "-D"], folder / f"slurmd-{node}.log", **found.environment)
        assert sorted(found.run("srun", "--quiet", "--nodes=2", "hostname").split()) == ["node0", "node1"]
        yield found
