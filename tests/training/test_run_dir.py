"""The run directory: what may change on resume, what is moved, and disks that are too small."""

import contextlib
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError, DamagedCheckpointError, StorageError
from DeBERTa.training.checkpoint import Snapshot, write_checkpoint, write_json
from DeBERTa.training.run_dir import (
    INPUTS,
    check_disk_space,
    check_same_run,
    flatten,
    open_run_dir,
    remove_unfinished,
    save_models,
)
from tests.conftest import GOLDEN, ROOT, tiny_model, tiny_rtd

VOCABULARY = GOLDEN / "prepare" / "spm.model"


def make_settings(**train: object) -> dict:
    return {
        "train": train,
        "model": {"generator": {"hidden_size": 8}},
        "data": {"train_sha256": "a"},
        "validation": {"valid_sha256": "b"},
        "code": {"package_sha256": "c"},
    }


def test_other_settings_are_refused_by_name(tmp_path):
    check_same_run(make_settings(seed=1, workers=2), make_settings(seed=1, workers=0), tmp_path)
    with pytest.raises(ConfigError, match=r"seed \(1 there, 2 here\)"):
        check_same_run(make_settings(seed=1), make_settings(seed=2), tmp_path)
    other = make_settings(seed=1) | {"model": {"generator": {"hidden_size": 16}}}
    with pytest.raises(ConfigError, match=r"generator.hidden_size \(8 there, 16 here\)"):
        check_same_run(make_settings(seed=1), other, tmp_path)
    # The flag may change, for example to the size that the config has; the size may not.
    mlm, other = (make_settings(vocab_size=0) | {"model": {"vocab_size": rows}} for rows in (900, 832))
    check_same_run(mlm, mlm | make_settings(vocab_size=900) | {"model": mlm["model"]}, tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size \(900 there, 832 here\)"):
        check_same_run(mlm, other, tmp_path)


def test_a_setting_that_is_missing_is_shown_in_words(tmp_path, caplog):
    check_same_run(make_settings(), make_settings() | {"validation": {"valid_sha256": None}}, tmp_path)
    assert "valid_sha256 (b there, none here)" in caplog.text
    assert "None" not in caplog.text


@pytest.mark.parametrize(
    ("saved", "given", "is_same", "is_same_in_longer"),
    [
        (0.5, 0.5, True, True),
        (3.0, 3.0, True, True),
        (0.5, 3.0, True, False),
        (3.0, 0.5, True, False),
        (0.5, 0.45, True, False),
        (0.5, 0.6, False, False),
        (3, 0.5, True, True),  # an earlier version recorded steps
        (3, 3.0, True, True),
        (3, 0.6, False, False),
    ],
)
def test_warm_up_in_steps_or_in_proportion(tmp_path, saved, given, is_same, is_same_in_longer):
    """Of a run of 6 steps, and of that run made longer."""
    for steps, is_accepted in ((6, is_same), (20, is_same_in_longer)):
        with contextlib.nullcontext() if is_accepted else pytest.raises(ConfigError, match="warmup"):
            old = make_settings(num_training_steps=6, warmup=saved)
            check_same_run(old, make_settings(num_training_steps=steps, warmup=given), tmp_path, step=6)


@pytest.fixture
def no_more_files() -> Iterator[None]:
    """Allow the process as many open files as it has."""
    before, unused = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(unused)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


WRITERS: list[Callable[[Path], object]] = [
    lambda path: write_checkpoint(path, Snapshot(1, {"a": torch.zeros(1)}, {}, {}, {}), 1, None),
    lambda path: open_run_dir(path, make_settings(), {}, fresh=False),
    lambda path: write_json(path / "evaluation.json", {}),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.usefixtures("no_more_files")
def test_too_many_open_files(tmp_path, write):
    """More space would not help."""
    with pytest.raises(StorageError, match=r"Too many open files; raise `ulimit -n`") as error:
        write(tmp_path)
    assert not re.search("free|room|give", str(error.value))


def test_nested_settings_get_dotted_names():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.json", "checkpoints/best.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_pipe_or_a_device_is_not_opened(tmp_path, name, kind, fresh):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (os.mkfifo if kind == "pipe" else lambda path: path.symlink_to("/dev/zero"))(tmp_path / name)
    with pytest.raises(StorageError, match=rf"{name} is a pipe or a device; remove it"):
        open_run_dir(tmp_path, make_settings(), {}, fresh)


def test_fresh_moves_the_previous_files(tmp_path):
    run_dir = tmp_path / "run"
    assert open_run_dir(run_dir, make_settings(), {}, fresh=False)[0] == 0
    (run_dir / "metrics.jsonl").write_text("old\n")
    (run_dir / "logs").mkdir()
    assert open_run_dir(run_dir, make_settings(), {}, fresh=True)[0] == 0
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock", "config.json", "environment.json", "logs"
    ]  # fmt: skip
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "old\n"


FRESH_THREE_TIMES = """
from pathlib import Path
from DeBERTa.training.run_dir import open_run_dir
from tests.training.test_run_dir import make_settings
for number in range(3):
    Path("{run}/metrics.jsonl").write_text(str(number))
    assert open_run_dir(Path("{run}"), make_settings(), {{}}, fresh=True)[0] == 0
print([Path("{run}/old-%d/metrics.jsonl" % number).read_text() for number in (1, 2, 3)])
"""


def test_fresh_moves_files_once_per_command(tmp_path):
    """A restart of the same command resumes what the command itself began, and no older run."""
    run_dir = tmp_path / "run"
    open_run_dir(run_dir, make_settings(), {}, fresh=False)
    (run_dir / "metrics.jsonl").write_text("old")
    for launch, number in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("", 3)):
        open_run_dir(run_dir, make_settings(), {}, fresh=True, launch=launch)
        (run_dir / "metrics.jsonl").write_text(launch)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "run", *(f"run.old-{n}" for n in range(1, number + 1))
        ]  # fmt: skip
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "old"


def test_fresh_on_a_mount_point(tmp_path):
    """The previous files cannot be moved out of it."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    python = shlex.join([sys.executable, "-c", FRESH_THREE_TIMES.format(run=run_dir)])
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {run_dir} && {python}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"unshare or mount not permitted, or the run failed: {done.stderr}"
    assert done.stdout == "['0', '1', '2']\n"
    assert list(tmp_path.iterdir()) == [run_dir]


def test_fresh_on_a_linked_directory(tmp_path):
    """The files stay on the disk that the link points to."""
    disk, run_dir = tmp_path / "disk", tmp_path / "run"
    (disk / "run").mkdir(parents=True)
    run_dir.symlink_to(disk / "run")
    (run_dir / "metrics.jsonl").touch()
    (disk / "run.old-1").symlink_to("/nowhere")
    open_run_dir(run_dir, make_settings(), {}, fresh=True)
    assert (disk / "run.old-2" / "metrics.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"]


@pytest.mark.parametrize("path", [".", "..", "{}/project/../project"])
def test_fresh_does_not_move_the_current_directory(tmp_path, monkeypatch, path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(ConfigError, match=r"--fresh would move .*, which is in use"):
        open_run_dir(Path(path.format(tmp_path)), make_settings(), {}, fresh=True)
    assert (tmp_path / "project" / "thesis.tex").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "project"] or path == ".."


@pytest.mark.parametrize("name", INPUTS)
def test_fresh_does_not_move_what_the_run_reads(tmp_path, name):
    (tmp_path / "run" / "data").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--fresh would move .*/run/data, which is in use"):
        open_run_dir(
            tmp_path / "run", make_settings(**{name: str(tmp_path / "run" / "data")}), {}, fresh=True
        )
    assert (tmp_path / "run" / "data").is_dir()


def test_other_code_is_a_warning(tmp_path, caplog):
    """Unlike other settings: a run can be resumed with a newer version."""
    check_same_run(make_settings(), make_settings(), tmp_path)
    assert caplog.text == ""
    check_same_run(
        make_settings(), make_settings() | {"code": {"package_sha256": "d", "torch": "2"}}, tmp_path
    )
    assert "resuming with other code: package_sha256 (c there, d here)" in caplog.text


@pytest.mark.parametrize("section", ["train", "model", "data"])
@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_checkpoint_without_settings_is_refused(tmp_path, section, value):
    """It would match any run."""
    with pytest.raises(DamagedCheckpointError, match=f"config.json .* has no section '{section}'"):
        check_same_run(make_settings() | {section: value}, make_settings(), tmp_path)


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write the run directory .* give another --output_dir"):
        open_run_dir(tmp_path / "file" / "run", make_settings(), {}, fresh=False)


def test_unfinished_files_are_removed(tmp_path):
    unfinished = tmp_path / "checkpoints" / "step-00000002.tmp"
    unfinished.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    (tmp_path / "report.html.part").touch()
    (tmp_path / "thesis.tex").write_text("text")
    (tmp_path / "checkpoints" / "best.json.part").symlink_to(tmp_path / "thesis.tex")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "text"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_disk_that_is_too_small(tmp_path):
    sizes = [check_disk_space(tmp_path, nn.Linear(2, 2), remaining, keep_last=2) for remaining in (1, 9)]
    assert sizes == [72 + 24, 4 * 72 + 24]  # weights and moments, at most four times; final weights
    large = nn.Linear(1 << 25, 1 << 25, device="meta")  # 4 PiB
    with pytest.raises(StorageError, match=r"the disk of .* MB free.*give another --output_dir"):
        check_disk_space(tmp_path, large, remaining=1, keep_last=1)


def test_final_models_load_elsewhere(tmp_path):
    torch.manual_seed(0)
    masked_lm = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    assert save_models(tmp_path, masked_lm, VOCABULARY) == [tmp_path / "model"]
    loaded = MaskedLanguageModel(ModelConfig.from_json(tmp_path / "model" / "config.json"))
    loaded.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=True)

    rtd = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    assert [path.name for path in save_models(tmp_path, rtd, VOCABULARY)] == ["generator", "discriminator"]
    config = ModelConfig.from_json(tmp_path / "discriminator" / "config.json")
    discriminator = ReplacedTokenDetectionModel(config)
    discriminator.load_state_dict(load_file(tmp_path / "discriminator" / "model.safetensors"), strict=True)
    assert (tmp_path / "generator" / "spm.model").read_bytes() == VOCABULARY.read_bytes()


def test_a_final_model_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "model").touch()
    advice = "give another path, then the same command writes it without training again$"
    with pytest.raises(StorageError, match=f"cannot write the final model: .*{advice}"):
        save_models(tmp_path, MaskedLanguageModel(ModelConfig.from_dict(tiny_model())), VOCABULARY)


def test_a_final_model_that_transformers_lacks(tmp_path, caplog):
    """It is written for this package alone, with a warning."""
    config = ModelConfig.from_dict(tiny_model() | {"attention_head_size": 64})
    model = MaskedLanguageModel(config)
    with caplog.at_level("WARNING", "DeBERTa"):
        (directory,) = save_models(tmp_path, model, VOCABULARY)
    assert "attention_head_size 64 makes 2 heads 128 wide" in caplog.text
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", "spm.model"}
    assert ModelConfig.from_json(directory / "config.json") == config
    assert "model_type" not in (directory / "config.json").read_text()
    loaded = MaskedLanguageModel(config)
    loaded.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
