"""The commands of docs/distributed.md under a real Slurm of two nodes: network namespaces with a slurmd each.

Needs root and Debian's packages slurm-wlm, iproute2 and util-linux; where one of them is missing, or
namespaces are not permitted, the tests fail and say so. The scripts are taken from the document, but for what
is small about them.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps, verify
from tests.commands import read_metrics_log
from tests.conftest import ROOT
from tests.nodes import run_command
from tests.processes import find_started, is_running
from tests.runs import read_final_files
from tests.slurm import Job, Slurm, start_slurm

STEPS = 40
# Few sequences a step; no checkpoint but the last unless asked for.
FLAGS = f"--num_training_steps {STEPS} --dump_interval {STEPS} --log_interval 1 --train_batch_size 8"
FLAGS += " --keep_last 9 --precision fp32 --workers 1"
PRESET = "--task_name RTD --do_train --model_config rtd_tiny.json --max_seq_length 128"
PRESET += " --learning_rate 2e-3 --warmup 40"


def read_documented(section: str) -> str:
    """Return the first block of commands in a section of the document."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    return re.search(rf"^### {section}$.*?```bash\n(.*?)```", text, re.MULTILINE | re.DOTALL)[1]


def replace_all(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, (old, text)
        text = text.replace(old, new)
    return text


def read_heading() -> str:
    """Return the documented script up to the command: for two nodes without GPUs."""
    lines = read_documented("Slurm").partition("srun")[0]
    return replace_all(lines, {"--nodes=4": "--nodes=2", " --gpus-per-node=8": ""})


def write_job_script(folder: Path, flags: str = "") -> str:
    """Return the documented script with two processes per node, on the tiny model."""
    model = f"deberta-v3-tiny --nproc_per_node 2 {FLAGS} --output_dir {folder}/node$SLURM_NODEID {flags}"
    command = replace_all("srun" + read_documented("Slurm").partition("srun")[2], {"deberta-v3-base": model})
    return f'{read_heading()}{command}status=$?\necho "srun ended with $status"\nexit $status\n'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with start_slurm(tmp_path_factory.mktemp("slurm"), ROOT) as found:
        yield found


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def submit(cluster: Slurm, cache: Path, folder: Path, script: str, *flags: str) -> Job:
    """Submit with this Python first on the path, and one cache for all jobs."""
    path = folder / "job.sh"
    path.write_text(script)
    where = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DEBERTA_CACHE": str(cache),
    }
    return Job(cluster, path, *flags, OMP_NUM_THREADS="1", **where)


@pytest.fixture(scope="module")
def undisturbed(cluster, cache, tmp_path_factory) -> Path:
    """Return the directory of a job that ran to its end; SIGUSR1 during data preparation did nothing."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, cache, folder, write_job_script(folder))
    job.wait_for(lambda: "training a vocabulary" in job.read_text())
    job.send_signal("--signal=USR1")
    assert job.finish() == 0, job.read_text()
    assert list_steps(folder / "node0") == [STEPS]
    return folder


def test_a_job_of_two_nodes(undisturbed):
    printed = (undisturbed / "job.printed").read_text()
    assert "4 processes on 2 nodes" in printed
    assert "srun ended with 0" in printed
    assert printed.count(f"step {STEPS}/{STEPS}") == 1
    for node in (0, 1):
        assert f"node {node} of 2 (node0, node1): starting 2 processes" in printed
    assert sorted(path.name for path in (undisturbed / "node1").iterdir()) == ["logs"]
    assert (undisturbed / "node0" / "discriminator" / "model.safetensors").exists()


def test_the_script_has_all_cores_of_the_nodes(cluster, cache, tmp_path):
    """Without --exclusive, one, which the processes would share."""
    cores = "srun python -c 'import os; print(len(os.sched_getaffinity(0)))'\n"
    for script, expected in (
        (read_heading(), os.cpu_count()),
        (replace_all(read_heading(), {" --exclusive": ""}), 1),
    ):
        job = submit(cluster, cache, tmp_path, script + cores)
        assert job.finish() == 0, job.read_text()
        assert job.read_text().split() == [str(expected)] * 2


def test_signals_to_a_job_and_the_same_job_again(cluster, cache, undisturbed, tmp_path):
    """SIGUSR1 and SIGTERM to the step, then `scancel`: each saves; the final bits are undisturbed.

    Slurm sends them to all processes, and the launchers forward them, too.
    """
    script, run_dir = write_job_script(tmp_path), tmp_path / "node0"
    job = submit(cluster, cache, tmp_path, script)
    job.wait_for(lambda: "step 3/" in job.read_text())
    job.send_signal("--signal=USR1")
    job.wait_for(lambda: "saved " in job.read_text())
    asked = list_steps(run_dir)[0]
    assert asked < STEPS / 2
    job.wait_for(lambda: f"step {asked + 4}/" in job.read_text())
    job.send_signal("--signal=TERM")
    assert job.end() == "FAILED 143:0", job.read_text()
    assert "srun ended with 143" in job.read_text()
    assert "Traceback" not in job.read_text()
    stopped = list_steps(run_dir)[-1]
    assert asked + 4 <= stopped < STEPS

    job = submit(cluster, cache, tmp_path, script)
    job.wait_for(lambda: f"step {stopped + 2}/" in job.read_text())
    assert f"resuming from step {stopped}" in job.read_text()
    job.send_signal()
    assert job.end() == "CANCELLED 0:15", job.read_text()  # codespell:ignore
    assert "stopped by SIGTERM; the same command resumes from the last checkpoint" in job.read_text()
    stopped_again = list_steps(run_dir)[-1]
    assert stopped + 2 <= stopped_again < STEPS
    for step in list_steps(run_dir):
        verify(get_checkpoint_path(run_dir, step))

    job = submit(cluster, cache, tmp_path, script)
    assert job.finish() == 0, job.read_text()
    assert f"resuming from step {stopped_again}" in job.read_text()
    assert read_final_files(run_dir) == read_final_files(undisturbed / "node0")


@pytest.mark.usefixtures("undisturbed")
def test_the_warning_before_the_time_limit(cluster, cache, tmp_path):
    """Slurm sends SIGUSR1 a minute before the limit, and SIGTERM at it: a checkpoint each. Some minutes."""
    script = write_job_script(
        tmp_path, "--num_training_steps 100000 --dump_interval 100000 --train_batch_size 4"
    )
    script = replace_all(script, {"USR1@600": "USR1@60"})
    job = submit(cluster, cache, tmp_path, script, "--time=60")
    job.wait_for(lambda: "step 3/" in job.read_text())
    job.limit(minutes=2)
    job.wait_for(lambda: "saved " in job.read_text())
    asked = list_steps(tmp_path / "node0")[0]
    job.wait_for(lambda: f"step {asked + 3}/" in job.read_text())
    assert job.end().startswith("TIMEOUT"), job.read_text()
    assert "DUE TO TIME LIMIT" in job.read_text()
    assert "stopped by SIGTERM" in job.read_text()
    first, second = list_steps(tmp_path / "node0")
    assert first == asked
    assert second >= asked + 3


RENDEZVOUS = "--rdzv_backend c10d --rdzv_id $SLURM_JOB_ID --rdzv_endpoint $MASTER_ADDR:$MASTER_PORT"
NUMBERED = "--node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port $MASTER_PORT"


@pytest.mark.parametrize("meeting", [RENDEZVOUS, NUMBERED], ids=["c10d", "numbered"])
def test_torchrun_in_a_job(cluster, cache, undisturbed, tmp_path, meeting):
    """It launches nothing itself; SIGUSR1 saves, SIGTERM saves and ends, the same job resumes bit for bit."""
    assert NUMBERED in (ROOT / "docs" / "distributed.md").read_text()
    data = f"--data_dir {cache}/sample/128 --vocab_path {cache}/sample/spm.model --vocab_size 8064"
    flags = f"{PRESET} {FLAGS} {data} --output_dir {tmp_path}/common"
    changes = {"--nproc_per_node 8": "--nproc_per_node 2", "FLAGS": flags, RENDEZVOUS: meeting}
    script = read_heading() + replace_all(read_documented("torchrun"), changes)
    job = submit(cluster, cache, tmp_path, script)
    job.wait_for(lambda: "step 3/" in job.read_text())
    job.send_signal("--signal=USR1")
    job.wait_for(lambda: "saved " in job.read_text())
    asked = list_steps(tmp_path / "common")[0]
    job.wait_for(lambda: f"step {asked + 3}/" in job.read_text())
    job.send_signal("--signal=TERM")
    assert job.finish() == 1, job.read_text()
    stopped = list_steps(tmp_path / "common")[-1]
    assert asked + 3 <= stopped < STEPS

    job = submit(cluster, cache, tmp_path, script)
    assert job.finish() == 0, job.read_text()
    assert "4 processes on 2 nodes" in job.read_text()
    assert f"resuming from step {stopped}" in job.read_text()
    logs = sorted(path.name for path in (tmp_path / "common" / "logs").iterdir())
    assert logs == [f"rank-000{rank}.log" for rank in range(4)]  # none of a launcher of ours
    assert [
        line["step"] for line in read_metrics_log(tmp_path / "common") if line["kind"] == "train"
    ] == list(range(1, STEPS + 1))
    assert read_final_files(tmp_path / "common") == read_final_files(undisturbed / "node0")


def test_nothing_is_left(cache, tmp_path):
    """A Slurm that ends in the middle of a job leaves no process."""
    (tmp_path / "slurm").mkdir()
    seconds = f"{os.getpid()}000"
    with start_slurm(tmp_path / "slurm", ROOT) as cluster:
        job = submit(
            cluster, cache, tmp_path, f"{read_heading()}srun bash -c 'echo here; exec sleep {seconds}'\n"
        )
        job.wait_for(lambda: job.read_text().count("here") == 2 and find_started(seconds))
        names = cluster.nodes.names
        processes = [*cluster.nodes.list_processes(0), *cluster.nodes.list_processes(1)]
        assert set(find_started(seconds)) < set(processes)
    assert not any(map(is_running, processes))
    assert find_started(seconds) == []
    assert not set(names) & set(run_command("ip", "netns", "list").split())
