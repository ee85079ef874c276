"""Checkpoints on disk: damage is found, old ones are pruned, a full disk is reported in one sentence."""

import json
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.config import read_json
from DeBERTa.errors import DamagedCheckpointError, DebertaError, StorageError
from DeBERTa.report.page import write_report
from DeBERTa.report.read import RunRecord
from DeBERTa.training.checkpoint import (
    FILES,
    MANIFEST,
    Saver,
    Snapshot,
    find_newest_valid,
    get_checkpoint_path,
    list_steps,
    read_model,
    read_training,
    verify,
    write_checkpoint,
    write_json,
    write_manifest,
)
from DeBERTa.training.metrics import MetricsLog
from DeBERTa.training.parallel import gather_to_rank_zero
from DeBERTa.training.run_dir import check_same_run, save_models
from DeBERTa.training.run_lock import LOCK
from DeBERTa.training.steps import ReplacedTokenStep
from tests.conftest import GOLDEN, ROOT, strip_times, tiny_model, tiny_rtd
from tests.runs import ForkedRun, build_arguments, copy_run, read_final_files, remove_after, run, tiny_flags
from tests.training.batches import random_batch
from tests.training.ranks import make_step


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared) -> dict:
    """Return the flags of a completed run: 6 steps, checkpoints at 2, 4 and 6."""
    flags = tiny_flags(tmp_path_factory.mktemp("trained"), prepared)
    status, output = run(flags)
    assert status == 0, output
    return flags


@pytest.fixture
def copied(trained, tmp_path) -> dict:
    """Return the flags of a copy of the run, to be damaged."""
    return trained | {"output_dir": copy_run(trained["output_dir"], tmp_path / "run")}


def list_damages(size: int) -> list[tuple[str, int | None]]:
    """Return kinds of damage: a length to truncate to, None to delete, the position of a bit to flip."""
    lengths = [(f"truncated to {percent} %", size * percent // 100) for percent in (0, 25, 50, 99)]
    return [*lengths, ("first bit flipped", -size), ("last bit flipped", -1), ("deleted", None)]


def damage(path: Path, length: int | None) -> None:
    """Truncate, delete or change a file, as `damages` describes."""
    content = bytearray(path.read_bytes())
    if length is None:
        path.unlink()
    elif length < 0:
        content[length] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:length])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_any_damage_is_found(copied, name):
    """The file is named, and the checkpoint before is the newest valid one."""
    folder = get_checkpoint_path(copied["output_dir"], 6)
    valid = (folder / name).read_bytes()
    verify(folder)
    for kind, length in list_damages(len(valid)):
        damage(folder / name, length)
        with pytest.raises(DamagedCheckpointError, match=name):
            verify(folder)
        step, found = find_newest_valid(copied["output_dir"])
        assert (step, len(found)) == (4, 1), kind
        assert str(folder / name) in str(found[0])
        (folder / name).write_bytes(valid)
    verify(folder)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_or_harmless(copied):
    """A manifest with the same content (a space for a line end) may pass; nothing else does."""
    folder = get_checkpoint_path(copied["output_dir"], 6)
    valid = (folder / MANIFEST).read_bytes()
    entries = json.loads(valid)["files"]
    for position in range(len(valid)):
        content = bytearray(valid)
        content[position] ^= 1
        (folder / MANIFEST).write_bytes(content)
        try:
            verify(folder)
        except DamagedCheckpointError:
            continue
        assert json.loads(content)["files"] == entries, position


def test_a_checkpoint_under_the_number_of_another_step_is_found(copied):
    folder = get_checkpoint_path(copied["output_dir"], 8)
    shutil.copytree(get_checkpoint_path(copied["output_dir"], 4), folder)
    step, found = find_newest_valid(copied["output_dir"])
    assert step == 6
    assert [str(damage) for damage in found] == [
        f"{folder} holds the checkpoint of step 4: it was copied or renamed ({folder / MANIFEST})"
    ]


def test_a_checkpoint_whose_manifest_was_changed_to_another_step_is_found(copied):
    folder = get_checkpoint_path(copied["output_dir"], 8)
    shutil.copytree(get_checkpoint_path(copied["output_dir"], 4), folder)
    write_manifest(folder, 8)
    step, found = find_newest_valid(copied["output_dir"])
    assert step == 6
    assert [str(damage) for damage in found] == [
        f"{folder} holds the checkpoint of step 4: it was copied or renamed ({folder / 'state.json'})"
    ]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["device", "pipe", "directory", "dangling link", "loop"])
def test_what_is_no_file_is_not_read(copied, name, kind):
    """Reading a device or a pipe would never end."""
    path = get_checkpoint_path(copied["output_dir"], 6) / name
    path.unlink()
    targets = {"device": "/dev/zero", "dangling link": "/nowhere", "loop": path}
    if kind in targets:
        path.symlink_to(targets[kind])
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    with pytest.raises(DamagedCheckpointError, match=name):
        verify(path.parent)


def test_a_manifest_may_name_no_other_files(copied):
    """What it says of them is not looked at."""
    folder = get_checkpoint_path(copied["output_dir"], 6)
    manifest = json.loads((folder / MANIFEST).read_text())
    os.mkfifo(folder / "pipe")
    manifest["files"] += [{"name": name, "size": 0, "sha256": ""} for name in ("/dev/zero", "../x", "pipe")]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    verify(folder)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, " " * (2 << 20), "null", '{"step": [], "files": []}', "1e999"]
)
def test_a_manifest_of_another_shape(copied, content):
    folder = get_checkpoint_path(copied["output_dir"], 6)
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json (cannot be read|has more than)"):
        verify(folder)


def test_only_names_that_are_written_are_checkpoints(tmp_path):
    for name in (
        "step-00000004",
        "step-000000004",
        "step-0000000\u0664",
        "step-4",
        "step-00000008.tmp",
        "step-123456789",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list_steps(tmp_path) == [4, 123456789]


def overwrite(content: bytes, generator: random.Random) -> bytes:
    """Return `content` with a few random bytes, or a part of it."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 3, 30))):
        changed[generator.randrange(min(len(changed), generator.choice((64, 4096, len(changed)))))] = (
            generator.randrange(256)
        )
    return bytes(changed if generator.random() < 0.7 else changed[: generator.randrange(len(changed))])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damaged_files_with_a_manifest_that_fits_them(copied, name):
    """Each is read, or refused in one sentence, whatever the bytes are."""
    folder, generator = get_checkpoint_path(copied["output_dir"], 6), random.Random(5)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    valid = {path: path.read_bytes() for path in folder.iterdir()}
    settings = json.loads(valid[folder / "config.json"])
    refused = []
    for _ in range(60):
        (folder / name).write_bytes(overwrite(valid[folder / name], generator))
        if name != MANIFEST:
            (folder / MANIFEST).write_bytes(valid[folder / MANIFEST])
            write_manifest(folder, 6)
        try:
            verify(folder)
            check_same_run(read_json(folder / "config.json"), settings, copied["output_dir"])
            read_json(folder / "state.json")
            read_model(copied["output_dir"], 6, model)
            read_training(copied["output_dir"], 6)
        except DebertaError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in message for message in refused)


def test_a_linked_checkpoint_is_resumed_and_pruned(copied, trained, tmp_path):
    """Someone moved two of them to another disk: pruning removes the links, and nothing there."""
    run_dir = copied["output_dir"]
    remove_after(run_dir, 4)
    for step in (2, 4):
        path = get_checkpoint_path(run_dir, step)
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    before = read_contents(tmp_path / "step-00000002")
    for _ in range(2):
        status, output = run(copied | {"keep_last": 1, "num_training_steps": 6})
        assert status == 0, output
    assert read_final_files(run_dir) == read_final_files(trained["output_dir"])
    assert set(list_steps(run_dir)) <= {4, 6}
    assert read_contents(tmp_path / "step-00000002") == before
    verify(tmp_path / "step-00000004")


@pytest.mark.parametrize("kind", ["link", "file", "directory"])
@pytest.mark.parametrize("step", [2, 6])
def test_an_unfinished_checkpoint_of_any_kind_is_removed(copied, trained, tmp_path, kind, step):
    """At the start; in its place the checkpoint of the same step is written."""
    remove_after(copied["output_dir"], 4)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    path = get_checkpoint_path(copied["output_dir"], step).with_suffix(".tmp")
    if kind == "link":
        path.symlink_to(tmp_path / "target")
    else:
        (Path.touch if kind == "file" else Path.mkdir)(path)
    status, output = run(copied)
    assert status == 0, output
    assert f"removing {path}" in output
    assert read_final_files(copied["output_dir"]) == read_final_files(trained["output_dir"])
    assert (tmp_path / "target" / "file").exists()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    before = os.umask(umask)
    try:
        snapshot = Snapshot(1, model.state_dict(), {}, {}, {})
        write_checkpoint(tmp_path, snapshot, 1, None)
        save_models(tmp_path, model, GOLDEN / "prepare" / "spm.model")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 12
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_a_run_directory_that_was_moved_is_not_created_again(tmp_path):
    """It is moved after its lock was checked, by whatever is written next."""
    run_dir, snapshot = tmp_path / "run", Snapshot(1, {"weight": torch.zeros(2)}, {}, {}, {})
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    record = RunRecord(run_dir, {}, {}, [{"step": 1, "kind": "train"}], {})
    for write in (
        lambda: write_checkpoint(run_dir, snapshot, 1, None),
        lambda: write_json(run_dir / "checkpoints" / "best.json", {}),
        lambda: write_report([record], run_dir / "report.html"),
        lambda: save_models(run_dir, model, GOLDEN / "prepare" / "spm.model"),
        lambda: MetricsLog(run_dir / "metrics.jsonl", 0, {}, 0.0, True),
    ):
        with pytest.raises(StorageError, match="No such file or directory"):
            write()
        assert not run_dir.exists()


@pytest.mark.parametrize("name", FILES)
def test_a_failed_write_names_the_file(tmp_path, name):
    """The libraries hide the system's error: "unexpected pos 17472 vs 17364"."""
    sizes = {"model.safetensors": 1000, "optimizer.pt": 2000, "state.json": 20_000, "config.json": 30_000}
    snapshot = Snapshot(
        1,
        {"weight": torch.zeros(sizes["model.safetensors"] // 4)},
        {"moments": torch.zeros(sizes["optimizer.pt"] // 4)},
        {"text": " " * sizes["state.json"]},
        {"text": " " * sizes["config.json"]},
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 10, hard))
    try:
        with pytest.raises(StorageError, match=rf"{name}: File too large; raise `ulimit -f`, or give"):
            write_checkpoint(tmp_path, snapshot, 1, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_run_resumes_from_the_checkpoint_before(copied, trained, name):
    damage(get_checkpoint_path(copied["output_dir"], 6) / name, 10)
    damaged = (get_checkpoint_path(copied["output_dir"], 6) / name).read_bytes()
    status, output = run(copied)
    assert status == 0, output
    assert (
        f"warning: damaged checkpoint: {get_checkpoint_path(copied['output_dir'], 6) / name} has 10 bytes"
        in output
    )
    assert "resuming from step 4" in output
    assert read_final_files(copied["output_dir"]) == read_final_files(trained["output_dir"])
    renamed = copied["output_dir"] / "checkpoints" / "damaged-step-00000006-1"
    assert str(renamed) in output
    assert (renamed / name).read_bytes() == damaged


def read_contents(folder: Path) -> dict[Path, bytes]:
    """Return all files except the lock, which stays in the run directory."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("fresh", [False, True])
def test_one_run_at_a_time_in_a_directory(prepared, tmp_path, fresh):
    """A second run is refused before it changes anything; a killed one leaves no lock."""
    flags = tiny_flags(tmp_path, prepared) | {"num_training_steps": 100_000, "workers": 1}
    first = ForkedRun(flags, live=True)
    first.wait_for("saved ")
    status, output = run(flags | {"fresh": fresh}, log=tmp_path / "second.log")
    assert status == 1
    assert f"another process (process {first.pid} on " in output
    assert str(flags["output_dir"]) in output
    assert first.process.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    last = list_steps(flags["output_dir"])[-1]
    # The schedule is a setting of the run, so that the second run is killed, not shortened.
    second = ForkedRun(flags | {"fresh": fresh}, live=True, log=tmp_path / "third.log")
    second.wait_for("--fresh: " if fresh else f"resuming from step {last}")
    os.kill(second.pid, signal.SIGKILL)
    second.finish()


def test_no_valid_checkpoint(copied, trained):
    """The damage is named and nothing changes; --fresh starts over and moves all files."""
    run_dir = copied["output_dir"]
    for step, name in ((2, "state.json"), (4, "optimizer.pt"), (6, "model.safetensors")):
        damage(get_checkpoint_path(run_dir, step) / name, 10)
    before = read_contents(run_dir)
    for more in ({}, {"do_train": False, "do_eval": True}):
        status, output = run(copied | more)
        assert status == 1
        message = output.strip().splitlines()[-1]
        assert message.startswith("error: none of the checkpoints")
        assert "--fresh" in message
        for part in (
            "step-00000002/state.json",
            "step-00000004/optimizer.pt",
            "step-00000006/model.safetensors",
        ):
            assert part in message
        assert read_contents(run_dir) == before
    for number in (1, 2):
        status, output = run(copied | {"fresh": True})
        assert status == 0, output
        old = run_dir.with_name(f"run.old-{number}")
        assert f"now in {old}" in output
        assert read_final_files(run_dir) == read_final_files(trained["output_dir"])
    assert read_contents(run_dir.with_name("run.old-1")) == before


def test_evaluation_skips_a_damaged_checkpoint_and_leaves_it(copied):
    damage(get_checkpoint_path(copied["output_dir"], 6) / "model.safetensors", 10)
    status, output = run(copied | {"do_train": False, "do_eval": True})
    assert status == 0, output
    assert "model.safetensors has 10 bytes" in output
    assert f"evaluating {get_checkpoint_path(copied['output_dir'], 4)}" in output
    assert list_steps(copied["output_dir"]) == [2, 4, 6]


def test_pruning_spares_the_newest_and_the_best(tmp_path, prepared):
    """The best by validation loss stays when it is no longer among the newest."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {
        "dump_interval": 1,
        "keep_last": 2,
        "num_training_steps": 8,
    }
    flags |= {
        "learning_rate": 0.1,
        "warmup": 8,
    }  # too high in the end, so that an early checkpoint is the best
    assert run(flags)[0] == 0
    lines = [json.loads(line) for line in (flags["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid"}
    best = min(losses, key=losses.get)
    assert best < 7, losses
    assert list_steps(flags["output_dir"]) == [best, 7, 8]
    recorded = json.loads((flags["output_dir"] / "checkpoints" / "best.json").read_text())
    assert recorded == {"step": best, "checkpoint": f"step-{best:08d}", "loss": losses[best]}


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = get_checkpoint_path(copied["output_dir"], 6)
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save({"training": Trap()}, file)
    write_manifest(folder, 6)
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt cannot be read"):
        read_training(copied["output_dir"], 6)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt cannot be read"):
        read_training(copied["output_dir"], 6)
    assert not Path("executed").exists()


CHANGES = {
    "no moments": lambda state: state.pop("training"),
    "no sums": lambda state: state.pop("interval"),
    "no optimizer": lambda state: state["training"]["optimizers"].clear(),
    "a list": lambda state: state.update(training=[]),
    "no counts": lambda state: state["training"]["stability"].clear(),
    "a number": lambda state: state.update(interval=3),
    "text": lambda state: state["training"]["optimizers"]["generator"]["state"].update({0: "moments"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_training_state_of_another_shape_is_one_error(copied, change):
    remove_after(copied["output_dir"], 4)
    path = get_checkpoint_path(copied["output_dir"], 4) / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    CHANGES[change](state)
    torch.save(state, path)
    write_manifest(path.parent, 4)
    status, output = run(copied)
    assert status == 1
    assert "Traceback" not in output, output
    assert f"error: {path} has another content than this version writes (" in output


def make_snapshot(training: ReplacedTokenStep, step: int) -> Snapshot:
    state = {"training": training.state_dict()}
    return Snapshot(step, gather_to_rank_zero(training.model.state_dict()), state, {"step": step}, {})


def test_bytes_saved_in_the_background_are_those_of_the_step(tmp_path):
    """Training continues while the thread writes; the files equal those written synchronously."""
    _, training = make_step("gdes")
    training.set_learning_rate(1)
    training(random_batch())
    for name in ("synchronous", "background"):
        (tmp_path / name).mkdir()
    write_checkpoint(tmp_path / "synchronous", make_snapshot(training, 1), 3, None)
    saver = Saver(tmp_path / "background", 3)
    snapshot = make_snapshot(training, 1)
    weight = training.model.generator.lm_predictions.lm_head.bias
    before = weight.detach().clone()
    saver.save(snapshot, best=None)
    training(random_batch())
    while (written := saver.check()) is None:
        training(random_batch())
    assert not torch.equal(before, weight)
    assert written == get_checkpoint_path(tmp_path / "background", 1)
    for name in (*FILES, MANIFEST):
        ours, theirs = (
            get_checkpoint_path(tmp_path / kind, 1) / name for kind in ("background", "synchronous")
        )
        assert ours.read_bytes() == theirs.read_bytes(), name
    saved = load_file(get_checkpoint_path(tmp_path / "background", 1) / "model.safetensors")
    assert torch.equal(saved["generator.lm_predictions.lm_head.bias"], before)


def check_until_written(saver: Saver) -> None:
    """Call `check` until the checkpoint is written, or its error is raised."""
    while saver.check() is None:
        pass


def test_one_save_at_a_time_and_its_error_from_the_next_call(tmp_path):
    _, training = make_step("gdes")
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    snapshot = make_snapshot(training, 1)
    for call in (lambda saver: saver.save(snapshot, None), Saver.wait, check_until_written):
        saver = Saver(tmp_path, 3)
        saver.save(snapshot, None)
        with pytest.raises(StorageError, match=r"step 1 .*checkpoints.*--output_dir"):
            call(saver)


def test_a_file_too_large_for_the_quota(tmp_path, prepared):
    """The system limits the size of a file, as a quota or a full disk would."""
    flags = tiny_flags(tmp_path, prepared) | {"num_training_steps": 8}
    assert run(flags | {"dump_interval": 4})[0] == 0
    remove_after(flags["output_dir"], 4)
    before = {path: path.read_bytes() for path in get_checkpoint_path(flags["output_dir"], 4).iterdir()}
    sizes = {path.name: len(content) for path, content in before.items()}
    for name in ("model.safetensors", "optimizer.pt"):
        status, output = run(flags, LARGEST_FILE=str(sizes[name] - 1000))
        assert status == 1, (name, output)
        message = output.strip().splitlines()[-1]
        assert "Traceback" not in output, output
        for part in (
            "error: cannot write the checkpoint of step 6 ",
            "File too large",
            "--output_dir",
            "raise `ulimit -f`",
            "resumes from step 4",
        ):
            assert part in message, message
        assert list_steps(flags["output_dir"]) == [4]
        assert not list(flags["output_dir"].glob("checkpoints/*.tmp"))
        assert {
            path: path.read_bytes() for path in get_checkpoint_path(flags["output_dir"], 4).iterdir()
        } == before
    assert run(flags)[0] == 0


ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=2m tmpfs {disk}
{train} --keep_last 100 && exit 9
test ! -e {disk}/run/checkpoints
mount -t tmpfs -o size=16m tmpfs {disk}
{train} --keep_last 100 && exit 9
ls -A {disk}/run/checkpoints
rm -r {disk}/run/checkpoints/step-00000001 {disk}/run/checkpoints/step-00000002
{train} --keep_last 1
cp -r {disk}/run {copy}
"""


def test_a_small_disk(tmp_path, prepared):
    """A disk too small from the start is reported before training, with both sizes; a full one in between.

    Then earlier checkpoints stay valid and no incomplete one stays. With room the same command ends with the
    bytes of an undisturbed run. The disk is real, mounted in a namespace of its own: where the system forbids
    that, this test fails.
    """
    flags = tiny_flags(tmp_path, prepared) | {"dump_interval": 1, "num_training_steps": 12}
    assert run(flags | {"keep_last": 1})[0] == 0
    checkpoint = sum(path.stat().st_size for path in get_checkpoint_path(flags["output_dir"], 12).iterdir())
    models = sum(path.stat().st_size for path in flags["output_dir"].glob("*/model.safetensors"))

    (tmp_path / "disk").mkdir()
    train = [
        sys.executable,
        "-m",
        "DeBERTa.train",
        *build_arguments(flags | {"output_dir": tmp_path / "disk" / "run"}),
    ]
    names = {"disk": tmp_path / "disk", "copy": tmp_path / "copy", "train": shlex.join(train)}
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK.format(**names)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"unshare or mount not permitted, or the run failed: {done.stderr}"
    assert "Traceback" not in done.stderr
    early, late = [line for line in strip_times(done.stderr).splitlines() if line.startswith("error: ")]
    free, one, final, needed = (
        float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) MB", early)
    )
    assert free <= 2.1
    assert needed == pytest.approx(one + final, abs=0.11)
    assert "--output_dir" in early
    assert one == pytest.approx(checkpoint / 1e6, rel=0.1)  # names and shapes need a little, too
    assert final == pytest.approx(models / 1e6, rel=0.1)
    assert re.search(r"room for \d of 12 ", done.stderr)
    assert re.search(r"step-\d+\.tmp/\w+\.\w+: No space left on device \([\d,.]+ MB free\)", late), late
    assert "--output_dir" in late
    saved = done.stdout.split()
    full = int(re.search(r"step (\d+) ", late)[1])
    assert 4 < full < 12
    assert f"resumes from step {full - 1}" in late
    assert saved == ["best.json", *(f"step-{step:08d}" for step in range(1, full))]
    assert f"resuming from step {full - 1}" in done.stderr
    ours, theirs = read_final_files(tmp_path / "copy"), read_final_files(flags["output_dir"])
    assert {name for name in theirs if ours[name] != theirs[name]} == set()


def test_a_run_directory_that_cannot_be_made(tmp_path, prepared):
    (tmp_path / "file").touch()
    flags = tiny_flags(tmp_path, prepared) | {"output_dir": tmp_path / "file" / "run"}
    status, output = ForkedRun(flags, log=tmp_path / "log").finish()
    assert status == 1
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith(f"error: cannot write the run directory {tmp_path / 'file'}/run: ")
    )
    assert "Not a directory; remove what is in the way, or give another --output_dir" in output
