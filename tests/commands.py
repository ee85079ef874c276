"""The training command in processes of its own, on one "node" or several of this machine."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.conftest import ROOT, strip_times
from tests.runs import build_arguments, tiny_flags

PATIENCE = 60  # seconds until a test gives up on something that takes a few


def find_free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_port_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def get_cluster(port: int, nodes: int = 2, node: int = 0) -> dict[str, str]:
    return {"WORLD_SIZE": str(nodes), "RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Command:
    """`python -m DeBERTa.train` on one node; what it prints goes to a file."""

    def __init__(self, flags: dict, *before: str, checkout: Path = ROOT, **environment: str) -> None:
        self.run_dir = Path(flags["output_dir"])
        self.printed = self.run_dir.with_suffix(".printed")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "GLOO"))}
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *(before or ["-m", "DeBERTa.train"]), *build_arguments(flags)],
                cwd=checkout,
                env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    def read_lines(self) -> list[str]:
        return strip_times(self.printed.read_text()).splitlines()

    def finish_with_error(self, status: int = 1) -> str:
        """Wait for its end, and return the one error that it ended with."""
        assert self.finish() == status, self.printed.read_text()
        errors = [line for line in self.read_lines() if line.startswith("error: ")]
        assert errors == self.read_lines()[-1:], self.printed.read_text()
        assert "Traceback" not in self.printed.read_text()
        return errors[0]

    def find_workers(self) -> dict[int, int]:
        """Process ids by rank, those still there; not their data workers, which look alike and came later."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                arguments, environment = (path / "cmdline").read_text(), (path / "environ").read_text()
                state = re.search(r"\) (\w)", (path / "stat").read_text())[1]
            except (OSError, TypeError):  # it ended meanwhile
                continue
            rank = re.search(r"(?:^|\0)RANK=(\d+)", environment)
            if (
                str(self.run_dir) in arguments
                and "DEBERTA_LAUNCHER_PID" in environment
                and rank
                and state != "Z"
            ):
                found[int(rank[1])] = min(int(path.name), found.get(int(rank[1]), math.inf))
        return found

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.printed.read_text()
            assert time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.05)


def start_nodes(
    flags: dict, port: int, *changes: dict, ranks: tuple[int, ...] = (0, 1), nodes: int = 2
) -> list:
    """Start the same command on several nodes, each with a disk of its own."""
    return [
        Command(
            flags | change | {"output_dir": f"{flags['output_dir']}-{number}"},
            **get_cluster(port, nodes, rank),
        )
        for number, (rank, change) in enumerate(zip(ranks, changes or ({},) * len(ranks), strict=True))
    ]


def watch_checkpoints(run: Command) -> Callable[[], bool]:
    return lambda: any((run.run_dir / "checkpoints").glob("step-*[0-9]")) if run.run_dir.exists() else False


# Flags of a run that trains until it is ended, and saves now and then.
ENDLESS = {"num_training_steps": 1_000_000, "dump_interval": 10, "keep_last": 2, "log_interval": 10}


def make_two_process_flags(folder: Path, prepared: Path) -> dict:
    return tiny_flags(folder, prepared) | {"dist_timeout": 20, "nproc_per_node": 2}


def read_metrics_log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
