"""The training command in processes forked from one that has imported torch: a start takes no seconds.

Each is a real process, in a session of its own, with one thread; it can receive signals and be killed.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps
from tests.conftest import ROOT, read_equal_metrics, strip_times, tiny_model, tiny_rtd
from tests.kill_at_call.sitecustomize import kill_at_call

# For the server. An empty entry would be the current directory.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
PATIENCE = 600  # seconds until a test fails whose run takes a few
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["DeBERTa.train", "torch._dynamo", "tests.conftest"])


def tiny_flags(folder: Path, prepared: Path, task: str = "RTD", sharing: str = "gdes") -> dict:
    """Return flags of a quick run: 6 steps, checkpoints at 2, 4 and 6, dropout and sampling on."""
    config = folder / f"{task}-{sharing}.json".lower()
    config.write_text(json.dumps(tiny_rtd(sharing) if task == "RTD" else tiny_model()))
    return {
        "task_name": task,
        "model_config": config,
        "data_dir": prepared,
        "vocab_path": prepared / "spm.model",
        "output_dir": folder / "run",
        "do_train": True,
        "max_seq_length": 64,
        "num_training_steps": 6,
        "dump_interval": 2,
        "log_interval": 3,
        "warmup": 2,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "workers": 0,
    }


def build_arguments(values: dict) -> list[str]:
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def _main(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    import resource

    import torch

    from DeBERTa.train import run_command

    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under `nohup`
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a process started by a shell; ours is inherited here
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    if "LARGEST_FILE" in environment:  # bytes; writing more gives the error "File too large", as a quota does
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["LARGEST_FILE"]),) * 2)
    if "KILL_AT_CALL" in environment:  # die at the n-th call that changes a file
        kill_at_call(int(environment["KILL_AT_CALL"]), environment.get("KILL_IN_THREAD", ""))
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    run_command()


class ForkedRun:
    """One run; its output goes to a file, or line by line to `lines` through a pipe.

    more: arguments after the flags of `values`.
    """

    def __init__(
        self, values: dict, *more: str, live: bool = False, log: Path | None = None, **environment: str
    ) -> None:
        self.log = log or Path(values["output_dir"]).with_name(Path(values["output_dir"]).name + ".log")
        self.log.unlink(missing_ok=True)
        if live:
            os.mkfifo(self.log)
        self.process = CONTEXT.Process(
            target=_main, args=([*build_arguments(values), *more], str(self.log), environment)
        )
        self.process.start()
        self.pid = self.process.pid
        self.read: list[str] = []
        self._unread = b""
        # Opened for writing, too, so that a run that never opens it does not block this process.
        self._pipe = os.open(self.log, os.O_RDWR) if live else None
        self.is_live = live

    def read_lines(self) -> Iterator[str]:
        """Yield lines as they are written, until the run ends. Fails after `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                self.read.append(line.decode() + "\n")
                yield self.read[-1]
            ready = wait([self._pipe, self.process.sentinel], max(deadline - time.monotonic(), 0))
            if not ready:
                self.kill_and_fail()
            if self._pipe not in ready:
                return
            self._unread += os.read(self._pipe, 1 << 16)

    def wait_for(self, text: str) -> None:
        """Read until a line contains `text`."""
        assert any(text in line for line in self.read_lines()), f"no {text!r} in: {''.join(self.read)}"

    def kill_and_fail(self) -> NoReturn:
        """End a run that takes too long."""
        os.killpg(self.pid, signal.SIGKILL)
        raise AssertionError(f"not over after {PATIENCE} s: {self.log}: {''.join(self.read)}")

    def stop_reading(self) -> None:
        """Close the pipe, whose messages then cannot be written."""
        os.close(self._pipe)
        self._pipe = None

    def finish(self) -> tuple[int, str]:
        """Return the exit status (negative: the signal that killed it) and the output."""
        if self._pipe:
            for _ in self.read_lines():
                pass
            os.close(self._pipe)
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.kill_and_fail()
        output = "".join(self.read) if self.is_live else self.log.read_text()
        return self.process.exitcode, strip_times(output)


def run(values: dict, log: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run to the end; returns exit status and output."""
    return ForkedRun(values, log=log, **environment).finish()


def run_pair(values: dict, port: int) -> tuple[int, str]:
    """Run two ranks without a launcher, which costs seconds; returns status and output of rank 0."""
    group = {
        "TORCHELASTIC_RUN_ID": "pair",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
    }
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    log = Path(values["output_dir"]).with_name("pair.log")
    both = [
        ForkedRun(values, log=log.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in (0, 1)
    ]
    (status, output), _ = [process.finish() for process in both]
    return status, output


def read_final_files(run_dir: Path) -> dict[str, bytes]:
    """Return what equal runs have in common: newest weights and moments, final models, metrics."""
    newest = get_checkpoint_path(run_dir, list_steps(run_dir)[-1])
    files = {
        path.name: path.read_bytes() for path in newest.iterdir() if path.suffix in (".safetensors", ".pt")
    }
    files |= {
        str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.glob("*/model.safetensors")
    }
    return files | {"metrics": json.dumps(read_equal_metrics(run_dir)).encode()}


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def remove_after(run_dir: Path, last: int) -> None:
    """Remove the checkpoints after step `last`, and the final models."""
    for step in list_steps(run_dir):
        if step > last:
            shutil.rmtree(get_checkpoint_path(run_dir, step))
    for name in ("model", "generator", "discriminator"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
