"""A run that was interrupted anywhere and resumed ends with the same bytes as one that was not."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from DeBERTa.config import TrainConfig
from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps
from tests.commands import Command, read_metrics_log
from tests.conftest import GOLDEN, ROOT
from tests.runs import copy_run, read_final_files, remove_after, run, tiny_flags

KINDS = [
    ("MLM", "gdes", {"max_ngram": 3}),
    ("RTD", "gdes", {}),
    ("RTD", "gdes", {"decoupled_training": False}),
    ("RTD", "es", {}),
    ("RTD", "nes", {}),
    ("MLM", "gdes", {"nproc_per_node": 2}),
    ("RTD", "gdes", {"nproc_per_node": 2}),
    ("RTD", "es", {"nproc_per_node": 2, "precision": "bf16"}),
    ("RTD", "gdes", {"nproc_per_node": 2, "sharding": "fsdp"}),
]


@pytest.mark.parametrize(("task", "sharing", "more"), KINDS)
def test_resume_is_bitwise(tmp_path, prepared, task, sharing, more):
    """Resume at steps 2 and 4 of 6; 2 micro-batches; 6 steps of 240 lines end in the third epoch of 600."""
    flags = tiny_flags(tmp_path, prepared, task, sharing) | more
    flags |= {"train_batch_size": 240, "accumulative_update": 2, "max_seq_length": 64}
    status, output = run(flags)
    assert status == 0, output
    run_dir = flags["output_dir"]
    for first in (2, 4):
        resumed = copy_run(run_dir, tmp_path / f"from-{first}")
        remove_after(resumed, first)
        status, output = run(flags | {"output_dir": resumed})
        assert status == 0, output
        assert f"resuming from step {first}" in output
        assert read_final_files(resumed) == read_final_files(run_dir)
    state = json.loads((get_checkpoint_path(run_dir, 6) / "state.json").read_text())
    assert (state["step"], state["seed"], state["epoch"], state["lines_into_epoch"]) == (6, 42, 2, 240)


@pytest.mark.parametrize(
    ("schedule", "first", "factor"), [("constant", 6, "1"), ("wsd", 4, "1"), ("linear", 6, "0.375")]
)
def test_a_finished_run_is_made_longer(tmp_path, prepared, schedule, first, factor):
    """Moments and position in the data continue: with equal rates it is the longer run from the start.

    `wsd` has equal rates up to a checkpoint before its decay. Under a schedule of other rates, the result is
    the same whether the run was interrupted or not.
    """
    flags = tiny_flags(tmp_path, prepared) | {"lr_schedule": schedule, "log_interval": 2}
    longer = flags | {"num_training_steps": 10}
    assert run(flags)[0] == 0
    run_dir = flags["output_dir"]
    remove_after(run_dir, first)
    interrupted = copy_run(run_dir, tmp_path / "interrupted")
    status, output = run(longer)
    assert status == 0, output
    assert f"the run of 6 steps is made longer: from step {first} on, its schedule is that of 10" in output
    assert f"resuming from step {first} at {factor} of the peak learning rate" in output
    if factor == "1":
        assert run(longer | {"output_dir": tmp_path / "from-the-start"})[0] == 0
        assert read_final_files(run_dir) == read_final_files(tmp_path / "from-the-start")
    assert run(longer | {"output_dir": interrupted})[0] == 0
    remove_after(interrupted, 8)
    assert run(longer | {"output_dir": interrupted})[0] == 0
    assert read_final_files(interrupted) == read_final_files(run_dir)
    status, output = run(flags)
    assert status == 1
    assert "num_training_steps (10 there, 6 here)" in output


def test_a_run_is_made_longer_by_the_same_command(tmp_path, prepared):
    """A warm-up of half of all steps, over in the shorter run, begins again where the longer one's is."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"warmup": 0.5}
    assert run(flags)[0] == 0
    status, output = run(flags | {"num_training_steps": 20})
    assert status == 0, output
    assert "resuming from step 6 at 0.7 of the peak learning rate" in output
    for warmup, status in ((0.6, 1), (0.5, 0)):  # another is refused, and the one before is not
        assert run(flags | {"num_training_steps": 40, "warmup": warmup})[0] == status


@pytest.mark.parametrize(("schedule", "warmup", "factor"), [("constant", 2, "1"), ("linear", 0.34, "0.5")])
def test_a_run_of_epochs_is_made_longer(tmp_path, prepared, schedule, warmup, factor):
    """A warm-up that is a proportion of all steps is longer, too; here it is over."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"train_batch_size": 200, "dump_interval": 3}
    flags |= {"lr_schedule": schedule, "warmup": warmup}
    del flags["num_training_steps"]
    assert run(flags)[0] == 0
    longer, run_dir = flags | {"num_train_epochs": 2}, flags["output_dir"]
    status, output = run(longer)
    assert status == 0, output
    assert f"resuming from step 3 at {factor} of the peak learning rate" in output
    assert list_steps(run_dir)[-1] == 6
    if factor == "1":
        assert run(longer | {"output_dir": tmp_path / "from-the-start"})[0] == 0
        assert read_final_files(run_dir) == read_final_files(tmp_path / "from-the-start")


def prepare_run(folder: Path, prepared: Path, first: int) -> tuple[dict, dict[str, bytes]]:
    """Return the flags of a run that resumes from `first` and ends one step later, and its final files."""
    flags = tiny_flags(folder, prepared) | {"dump_interval": 1, "num_training_steps": first + 1}
    status, output = run(flags)
    assert status == 0, output
    expected = read_final_files(flags["output_dir"])
    remove_after(flags["output_dir"], first)
    return flags, expected


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    """Version 0.1.0 of November 2026 wrote it: it has other flags, and no times, token counts or code."""
    shutil.unpack_archive(GOLDEN / "run-0.1.0.zip", tmp_path)
    run_dir, lines = tmp_path / "run", (GOLDEN / "prepare" / "expected_64.txt").read_text().splitlines(True)
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "valid.txt").write_text("".join(lines[:10]))
    settings = json.loads((run_dir / "config.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(settings["model"]))
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = {
        name: value for name, value in settings["train"].items() if name in names and value not in ("", None)
    }
    flags |= {"model_config": tmp_path / "model.json", "data_dir": tmp_path, "output_dir": run_dir}
    flags |= {"vocab_path": GOLDEN / "prepare" / "spm.model"}
    expected = read_metrics_log(run_dir)
    status, output = run(flags | {"kernels": "off"})  # draws other dropout masks
    assert status == 1
    assert "kernels (auto there, off here)" in output
    status, output = run(flags)
    assert status == 0, output
    assert "resuming from step 2" in output
    resumed = read_metrics_log(run_dir)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected] == [1, 2, 2, 3, 4, 4]
    for before, now in zip(expected, resumed, strict=True):
        losses = [name for name in before if name.endswith(("loss", "norm", "learning_rate"))]
        # Sums in another order, on another processor.
        assert [now[name] for name in losses] == pytest.approx([before[name] for name in losses], rel=1e-4)
    assert 0 < resumed[3]["tokens_seen"] <= flags["train_batch_size"] * flags["max_seq_length"]
    best = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    assert best["discriminator_loss"] == pytest.approx(expected[-1]["discriminator_loss"], rel=1e-4)


def test_another_validation_split(tmp_path, prepared):
    """The run resumes, with a warning; losses on different texts are not compared."""
    data = shutil.copytree(prepared, tmp_path / "data")
    flags = tiny_flags(tmp_path, data, "MLM") | {"keep_last": 9}
    assert run(flags)[0] == 0
    expected = read_final_files(flags["output_dir"])
    remove_after(flags["output_dir"], 4)
    shutil.copy(data / "test.txt", data / "valid.txt")
    status, output = run(flags)
    assert status == 0, output
    assert "warning: resuming with another validation split: valid_sha256 (" in output
    best = flags["output_dir"] / "checkpoints" / "best.json"
    losses = {}
    for line in read_metrics_log(flags["output_dir"]):
        if line["kind"] == "valid":
            losses.setdefault(line["text_sha256"], {})[line["step"]] = line["loss"]
    first, second = losses.values()
    assert list(first) == [2, 4]
    assert list(second) == [4, 6]  # the checkpoint that it resumed from was evaluated, too
    recorded = json.loads(best.read_text())
    assert recorded["loss"] == second[recorded["step"]] == min(second.values())
    (data / "valid.txt").unlink()
    remove_after(flags["output_dir"], 4)
    status, output = run(flags)
    assert status == 0, output
    assert "resuming with another validation split" in output
    assert json.loads(best.read_text())["loss"] == second[4]
    newest = read_final_files(flags["output_dir"])
    assert {name for name in expected if newest[name] != expected[name]} == {"metrics"}


def test_another_validation_split_between_evaluations(tmp_path, prepared):
    """A checkpoint that is at no multiple of --dump_interval is evaluated on the new text, too."""
    data = shutil.copytree(prepared, tmp_path / "data")
    flags = tiny_flags(tmp_path, data, "MLM") | {"num_training_steps": 5, "dump_interval": 4}
    assert run(flags)[0] == 0
    shutil.copy(data / "test.txt", data / "valid.txt")
    status, output = run(flags | {"num_training_steps": 8})
    assert status == 0, output
    evaluated = [line for line in read_metrics_log(flags["output_dir"]) if line["kind"] == "valid"]
    assert [line["step"] for line in evaluated] == [4, 5, 5, 8]
    assert len({line["text_sha256"] for line in evaluated[:2]}) == 1
    assert {line["text_sha256"] for line in evaluated[2:]}.isdisjoint({evaluated[0]["text_sha256"]})


def test_missing_metrics_are_a_warning(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared, "MLM")
    assert run(flags)[0] == 0
    remove_after(flags["output_dir"], 4)
    (flags["output_dir"] / "metrics.jsonl").unlink()
    status, output = run(flags)
    assert status == 0, output
    assert "metrics.jsonl is missing: evaluations up to step 4 are unknown, and with them the best" in output


def kill_at_every_call(killed: dict, start: Path, first: int, expected: dict, thread: str) -> list[str]:
    """SIGKILL at the n-th call of a thread, for all n until a run ends; return the places.

    Of the calls that write final models, one in six: tests/hub/test_export.py has them all.
    """
    number, run_dir, places = 1, killed["output_dir"], []
    while True:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(start, run_dir)
        status, output = run(killed, KILL_AT_CALL=str(number), KILL_IN_THREAD=thread)
        if status == 0:
            return places
        assert status == -signal.SIGKILL, (number, output)
        places.append(output.strip().splitlines()[-1])
        assert (list_steps(run_dir) or [0])[-1] >= first, places[-1]
        status, output = run(killed)
        assert status == 0, (places[-1], output)
        assert read_final_files(run_dir) == expected, places[-1]
        assert not [*run_dir.rglob("*.tmp*"), *run_dir.rglob("*.part")], places[-1]
        number += 6 if re.search(r"/\.?(generator|discriminator)\.tmp", places[-1]) else 1


@pytest.mark.parametrize("first", [0, 3])
def test_killed_at_every_call_that_changes_a_file(tmp_path, prepared, first):
    """Each resumes and ends with the same bytes.

    From step 0 there is no checkpoint before; from step 3 there are two, one of which is pruned.
    """
    flags, expected = prepare_run(tmp_path, prepared, first)
    start, killed = flags["output_dir"], flags | {"output_dir": tmp_path / "killed", "keep_last": 1}
    if not first:
        shutil.rmtree(start)
        start.mkdir()
    places = []
    for thread in ("MainThread", "ThreadPoolExecutor"):  # the second one writes the checkpoints
        places += kill_at_every_call(killed, start, first, expected, thread)
    renamed = f"rename {killed['output_dir']}/checkpoints/step-0000000{first + 1}.tmp"
    assert any(renamed in place for place in places), places
    calls = {place.split()[2] for place in places}  # "killed at CALL PATH"
    assert calls >= {"write", "fsync", "replace", "rename"} | ({"rmdir", "unlink"} if first else set())


def test_command_killed_at_a_call(tmp_path, prepared):
    """The command of a shell instead of a forked run: Python wraps the calls when it starts."""
    flags, expected = prepare_run(tmp_path, prepared, 1)
    killed = Command(flags, PYTHONPATH=str(ROOT / "tests" / "kill_at_call"), KILL_AT_CALL="30")
    assert killed.finish() == -signal.SIGKILL
    # Another thread can write a line between these words and the signal.
    assert any(line.startswith("killed at ") for line in killed.read_lines()), killed.read_lines()
    assert run(flags)[0] == 0
    assert read_final_files(flags["output_dir"]) == expected
