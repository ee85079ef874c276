"""A run that was cut anywhere and started again ends with the bytes of one that was not."""

import json
import shutil

import pytest

from DeBERTa.training.checkpoint import get_checkpoint_path, list_steps
from tests.runs import copy_run, final_files, run, tiny_flags

KINDS = [
    ("MLM", "gdes", {"max_ngram": 3}),
    ("RTD", "gdes", {}),
    ("RTD", "gdes", {"decoupled_training": False}),
    ("RTD", "es", {}),
    ("RTD", "nes", {}),
    ("MLM", "gdes", {"nproc_per_node": 2}),
    ("RTD", "gdes", {"nproc_per_node": 2}),
    ("RTD", "es", {"nproc_per_node": 2, "precision": "bf16"}),
]


@pytest.mark.parametrize(("task", "sharing", "more"), KINDS)
def test_resume_is_bitwise(tmp_path, prepared, task, sharing, more):
    """Cut after step 2 and after step 4 of 6; accumulation on; 6 steps of 240 lines end in the third epoch of 600."""
    flags = tiny_flags(tmp_path, prepared, task, sharing) | more
    flags |= {"train_batch_size": 240, "accumulative_update": 2, "max_seq_length": 64}
    status, output = run(flags)
    assert status == 0, output
    whole = flags["output_dir"]
    for cut in (2, 4):
        part = copy_run(whole, tmp_path / f"cut-{cut}")
        for step in list_steps(part):
            if step > cut:
                shutil.rmtree(get_checkpoint_path(part, step))
        for name in ("model", "generator", "discriminator"):
            shutil.rmtree(part / name, ignore_errors=True)
        status, output = run(flags | {"output_dir": part})
        assert status == 0, output
        assert f"going on from step {cut}" in output
        assert final_files(part) == final_files(whole)
    state = json.loads((get_checkpoint_path(whole, 6) / "state.json").read_text())
    assert (state["step"], state["seed"], state["epoch"], state["lines_into_epoch"]) == (6, 42, 2, 240)


CRASH_POINTS = (
    "snapshot-taken", "before-save", "folder-made", "model-written", "optimizer-written", "state-written",
    "files-synced", "manifest-written", "manifest-synced", "renamed", "rename-synced", "old-renamed", "pruned",
)  # fmt: skip


def test_killed_at_every_point_of_saving(tmp_path, prepared):
    """SIGKILL at each point of two saves, the last one among them; the same command finishes with the same bytes."""
    flags = tiny_flags(tmp_path, prepared) | {"keep_last": 1, "dump_interval": 1, "num_training_steps": 4}
    assert run(flags)[0] == 0
    expected = final_files(flags["output_dir"])
    for point in CRASH_POINTS:
        for step in (3 if point == "old-renamed" else 2, 4):  # at step 2 only the best is old, and it is kept
            killed = flags | {"output_dir": tmp_path / f"{point}-{step}"}
            status, output = run(killed, DEBERTA_CRASH_AT=f"{point}@{step}")
            assert status == -9, (point, step, output)
            before = list_steps(killed["output_dir"])
            assert before and before[-1] >= step - 1, (point, step)
            status, output = run(killed)
            assert status == 0, (point, step, output)
            assert final_files(killed["output_dir"]) == expected, (point, step)
            assert not list(killed["output_dir"].glob("checkpoints/*.tmp"))
