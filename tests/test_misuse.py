"""Commands as a newcomer may get them wrong: each ends with one sentence that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, strip_times

D = "--data_dir {prepared} --vocab_path {prepared}/spm.model --output_dir {folder}/run"
TRAIN = "python -m DeBERTa.train --preset deberta-v3-tiny --workers 0 --num_training_steps 1"
MLM = TRAIN.replace("deberta-v3-tiny", "deberta-tiny")


def fail(command: str, first_on_path: Path = Path(sys.executable).parent, **environment: str) -> str:
    """Run a command that fails, and return its last line without its time."""
    path = f"{first_on_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = strip_times(done.stderr).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("sh rtd.sh no-such-preset", "no preset 'no-such-preset'; usage: ./rtd.sh NAME [flags]"),
        ("python -m DeBERTa.train deberta-v3-tiny", "'deberta-v3-tiny': give --preset deberta-v3-tiny"),
        ("python -m DeBERTa.train --do_train", "--model_config is required: JSON file"),
        (f"{TRAIN} --data_dir x", "give it, or a --preset without --data_dir"),
        (
            f"{TRAIN} --vocab_path none.model",
            "--vocab_path none.model: there is no such file; check the path",
        ),
        (f"{TRAIN} {D} --model_config bert_tiny.json", "an MLM model; give --task_name MLM"),
        (f"{MLM} {D} --model_config rtd_tiny.json", "an RTD model; give --task_name RTD"),
        (f"{TRAIN} {D} --attention triton", "its kernels need a CUDA GPU, not a CPU; use --attention auto"),
        (f"{TRAIN} {D} --max_seq_length 32", "prepare the text for this length"),
        (f"{MLM} {D} --rtd_lambda 20", "--rtd_lambda is for --task_name RTD: omit it"),
        (f"{TRAIN} {D} --max_ngram 3", "--max_ngram is for --task_name MLM: omit it"),
        (f"{TRAIN} {D} --replay_share 0.5", "--replay_share is for the text of --replay: give --replay, too"),
        (f"{TRAIN} {D} --data_dir {{folder}}/none", "no such directory; prepare_data.py makes one"),
        (
            "python -m DeBERTa.train --preset deberta-base --max_seq_length 9",
            "with --preset NAME that of a preset",
        ),
        ("python -m DeBERTa.report", "the following arguments are required: RUN; --help lists the flags"),
        ("python -m DeBERTa.report {folder}", "give the directory of a run"),
        ("python experiments/track.py", "the following arguments are required: run, --tracker; --help"),
    ],
)
def test_one_sentence(command, sentence, tmp_path, prepared):
    assert sentence in fail(command.format(prepared=prepared, folder=tmp_path))


def test_no_python_that_is_new_enough(tmp_path):
    """The scripts try both names; these programs fail as an old Python does when its version is checked."""
    for name in ("python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    for script in ("rtd.sh", "mlm.sh", "tests/run.sh"):
        assert fail(f"bash {script} --help", tmp_path) == (
            "no Python 3.10 or newer found as python or python3; install one, or activate its environment"
        )


@pytest.mark.parametrize(
    "command",
    [
        "{python} -m DeBERTa.train --help",
        "{python} {root}/prepare_data.py --help",
        "bash {root}/rtd.sh --help",
    ],
)
def test_a_removed_directory(command, tmp_path):
    """Libraries would end the process in their own words."""
    line = f"mkdir gone; cd gone; rmdir ../gone; exec {command.format(root=ROOT, python=sys.executable)}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: the current directory was removed: change to another"


@pytest.mark.parametrize("script", ["rtd.sh", "mlm.sh"])
def test_scripts_from_any_directory(tmp_path, script):
    """By a link, with CDPATH, and where the directory has modules of the same names as ours and Python's."""
    (tmp_path / "link").symlink_to(ROOT / script)
    if sys.version_info >= (3, 11):
        (tmp_path / "DeBERTa").mkdir()
        (tmp_path / "DeBERTa" / "__init__.py").touch()
        (tmp_path / "random.py").write_text("raise ImportError('not of Python')\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in ("./link", f"bash {os.path.relpath(ROOT, tmp_path)}/{script}"):
        done = subprocess.run(
            ["bash", "-c", f"{command} --help"],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "CDPATH": "."},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "--train_batch_size" in done.stdout


def test_a_full_disk(tmp_path, prepared):
    """A limit of the size of files, which the token store is below, and the checkpoint is not."""
    line = f"ulimit -f 2000; exec {TRAIN} {D}".format(prepared=prepared, folder=tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = strip_times(done.stderr).splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large; raise `ulimit -f`, or give another --output_dir" in last
