"""`--dry_run`: what it reports against a run with the same flags, and that it leaves nothing behind."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa import RTDConfig
from DeBERTa.model.flops import count_flops_per_token
from DeBERTa.train import main
from tests.commands import find_free_port
from tests.conftest import ROOT, strip_times
from tests.runs import PATIENCE, build_arguments, tiny_flags

CONFIGS = ROOT / "experiments" / "language_model"


def train(flags: dict, **environment: str) -> subprocess.CompletedProcess:
    """Run the command as a child of a shell: a child of this process would inherit its peak of memory."""
    line = shlex.join([sys.executable, "-m", "DeBERTa.train", *build_arguments(flags)])
    variables = "".join(f"export {name}={value}; " for name, value in environment.items())
    return subprocess.run(
        ["bash", "-c", f"export OMP_NUM_THREADS=1; {variables}{line}; exit $?"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def read_rows(done: subprocess.CompletedProcess) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    lines = strip_times(done.stderr).splitlines()
    return dict(re.split(r"  ", line.strip(), maxsplit=1) for line in lines if "  " in line.strip())


def make_preset_flags(folder: Path, prepared: Path, model: str, **others: object) -> dict:
    task = "RTD" if "rtd" in model else "MLM"
    flags = tiny_flags(folder, prepared) | {"task_name": task, "model_config": CONFIGS / model}
    flags |= {"max_seq_length": 64, "train_batch_size": 96, "eval_batch_size": 96}
    return flags | {"num_training_steps": 12, "dump_interval": 4, "log_interval": 1} | others


def assert_peak_is_estimated(flags: dict) -> None:
    """To 15 %. The heap is compact as by mlm.sh and rtd.sh."""
    compact = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    tried = read_rows(train(flags | {"dry_run": "True"}, **compact))
    assert not Path(flags["output_dir"]).exists()
    assert train(flags, **compact).returncode == 0
    lines = map(json.loads, (Path(flags["output_dir"]) / "metrics.jsonl").read_text().splitlines())
    measured = [line["peak_memory_gb"] for line in lines if line["kind"] == "train"][-1]
    estimated = float(tried["memory"].split()[0])
    print(f"{estimated} GB estimated, {measured} GB measured")
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("model", "others"), [("rtd_tiny.json", {}), ("deberta_tiny.json", {"accumulative_update": 2})]
)
def test_peak_memory(tmp_path, prepared, model, others):
    assert_peak_is_estimated(make_preset_flags(tmp_path, prepared, model, **others))


def test_report(tmp_path, prepared):
    """Steps, batch, FLOPs and time; nothing is written, but the logs of ranks next to the run directory."""
    flags = make_preset_flags(tmp_path, prepared, "rtd_tiny.json", train_batch_size=8, dry_run="True")
    before = sorted(tmp_path.iterdir())
    rows = read_rows(train(flags))
    assert sorted(tmp_path.iterdir()) == before
    assert rows["batch"] == "8 sequences of 64: 512 tokens per step"
    assert rows["steps"].startswith("12, ")
    assert re.match(r"0:00:\d\d: \S+ s per step, 3 evaluations of \S+ s$", rows["time"])
    total, step = map(float, re.match(r"(\S+) FLOPs in matmuls, (\S+) per step: ", rows["compute"]).groups())
    assert total == pytest.approx(12 * step, rel=0.01)
    assert re.match(r"0\.\d+ GB for checkpoints and final models; \S+ GB free in /", rows["disk"])
    assert " MB" in rows["shared memory"]
    ranks = flags | {"nproc_per_node": 2, "dist_timeout": 30}
    assert read_rows(train(ranks, MASTER_PORT=str(find_free_port())))["processes"].startswith("2 processes")
    assert [path.name for path in sorted(tmp_path.iterdir()) if path not in before] == [
        f"{Path(flags['output_dir']).name}.dry-run"
    ]


def test_updates_in_float16(tmp_path, prepared, monkeypatch):
    """None is skipped: the optimizer's state is a part of the peak. A real run begins with skipped ones."""
    states: list[dict] = []
    monkeypatch.setattr("DeBERTa.train.keep_freed_memory", lambda: None)  # it would last for this process
    monkeypatch.setattr(
        "DeBERTa.dry_run.time_evaluation",
        lambda run: states.extend(optimizer.state for optimizer in run.training.optimizers.values()) or 1.0,
    )
    flags = make_preset_flags(tmp_path, prepared, "rtd_tiny.json", train_batch_size=8, dry_run="True")
    # A large loss, which overflows at the usual scale.
    assert main(build_arguments(flags | {"precision": "fp16", "rtd_lambda": 3000})) == 0
    assert len(states) == 2
    assert all({int(values["step"]) for values in state.values()} == {6} for state in states)


def test_disk_of_a_linked_run_directory(tmp_path, prepared):
    """It is the disk that the run would be on."""
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is on the same disk")
    flags = make_preset_flags(tmp_path, prepared, "rtd_tiny.json", train_batch_size=8, dry_run="True")
    Path(flags["output_dir"]).symlink_to("/dev/shm")
    assert read_rows(train(flags))["disk"].endswith(" GB free in /dev/shm")


def test_compute_of_short_lines(tmp_path, prepared):
    """Batches are padded to their longest line: 5 tokens up to a multiple of 8."""
    flags = make_preset_flags(tmp_path, prepared, "rtd_tiny.json", train_batch_size=8, dry_run="True")
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.txt").write_text("▁the ▁of ▁and\n" * 50, encoding="utf-8")
    rows = read_rows(train(flags | {"data_dir": data, "vocab_size": 8064}))
    config = RTDConfig.from_json(CONFIGS / "rtd_tiny.json")
    assert {model.vocab_size for model in config.models} == {8064}
    step = float(re.search(r", (\S+) per step: ", rows["compute"])[1])
    assert step == pytest.approx(8 * 8 * count_flops_per_token(config, 8), rel=0.01)


def test_it_belongs_to_training(tmp_path, prepared):
    flags = make_preset_flags(
        tmp_path, prepared, "rtd_tiny.json", do_train="False", do_eval="True", dry_run="True"
    )
    done = train(flags)
    assert done.returncode == 2
    assert "--dry_run tries training: give --do_train, too" in done.stderr
