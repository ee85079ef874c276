"""SIGKILL at random moments, and the same command again until it ends: the bytes of an undisturbed run.

Some minutes: `bash tests/run.sh tests/slow`.
"""

import random
import signal
import subprocess
import sys
import time

from DeBERTa.data.token_store import get_store_path
from tests.conftest import ROOT
from tests.data.test_prepare import VOCABULARY, sample_megabytes
from tests.runs import ForkedRun, read_final_files, run, tiny_flags

MOMENTS = 20


def test_training_killed_at_random_moments(tmp_path, prepared):
    """Twenty runs, each killed once between its start and its end, then resumed."""
    flags = tiny_flags(tmp_path, prepared) | {"num_training_steps": 30, "dump_interval": 5, "workers": 1}
    status, output = run(flags)
    assert status == 0, output
    started = time.monotonic()
    assert (
        run(flags | {"output_dir": tmp_path / "timed"})[0] == 0
    )  # the first run also starts the fork server
    duration = time.monotonic() - started
    expected = read_final_files(flags["output_dir"])
    moments = random.Random(0)
    killed = 0
    for number in range(MOMENTS):
        again = flags | {"output_dir": tmp_path / f"run-{number}"}
        process = ForkedRun(again)
        process.process.join(timeout=moments.uniform(0, 0.9 * duration))
        process.process.kill()
        killed += process.finish()[0] == -signal.SIGKILL
        status, output = run(again)
        assert status == 0, output
        assert read_final_files(again["output_dir"]) == expected, number
    assert killed > MOMENTS // 2


def test_one_run_killed_again_and_again(tmp_path, prepared):
    """The same run, killed until it reaches its end."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {
        "num_training_steps": 40,
        "dump_interval": 2,
        "keep_last": 1,
    }
    assert run(flags)[0] == 0
    again = flags | {"output_dir": tmp_path / "again"}
    moments = random.Random(1)
    status, kills = None, 0
    while status != 0:
        process = ForkedRun(again)
        process.process.join(timeout=moments.uniform(0.5, 1.5))
        process.process.kill()
        status, output = process.finish()
        assert status in (0, -signal.SIGKILL), output
        kills += status != 0
    assert kills > 0
    assert read_final_files(again["output_dir"]) == read_final_files(flags["output_dir"])


def test_preparation_killed_at_random_moments(tmp_path):
    """Text with a vocabulary trained on it: vocabulary, text and ids."""
    text = tmp_path / "text"
    text.write_bytes(sample_megabytes(4))
    names = ("train.txt", "spm.model")

    def build_command(folder) -> list[str]:
        flags = ["-i", text, "-o", folder / "train.txt", "--train_vocab", 500, "--workers", 2]
        return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, flags)]

    started = time.monotonic()
    subprocess.run(build_command(tmp_path / "undisturbed"), check=True, capture_output=True)
    duration = time.monotonic() - started
    moments = random.Random(2)
    killed = 0
    for number in range(MOMENTS):
        folder = tmp_path / f"run-{number}"
        process = subprocess.Popen(
            build_command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=moments.uniform(0, duration))
        except subprocess.TimeoutExpired:
            process.kill()
        killed += process.wait() == -signal.SIGKILL
        subprocess.run(build_command(folder), check=True, capture_output=True)
        for name in names:
            assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), (
                number,
                name,
            )
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in (tmp_path / "undisturbed").iterdir()
        )
    assert killed > MOMENTS // 2


def test_fixed_vocabulary_killed_at_random_moments(tmp_path):
    """Eight megabytes with a given vocabulary: killed while workers encode."""
    text = tmp_path / "text"
    text.write_bytes(sample_megabytes(8))

    def build_command(output) -> list[str]:
        flags = ["-i", text, "-o", output, "--vocab_path", VOCABULARY, "--workers", 2]
        return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, flags)]

    started = time.monotonic()
    subprocess.run(build_command(tmp_path / "undisturbed.txt"), check=True, capture_output=True)
    duration = time.monotonic() - started
    moments = random.Random(3)
    killed = 0
    for number in range(MOMENTS):
        output = tmp_path / f"{number}" / "train.txt"
        process = subprocess.Popen(
            build_command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=moments.uniform(0, duration))
        except subprocess.TimeoutExpired:
            process.kill()
        killed += process.wait() == -signal.SIGKILL
        subprocess.run(build_command(output), check=True, capture_output=True)
        assert output.read_bytes() == (tmp_path / "undisturbed.txt").read_bytes(), number
        assert sorted(path.name for path in output.parent.iterdir()) == ["train.txt", "train.txt.ids"]
        assert get_store_path(output).is_file()
    assert killed > MOMENTS // 2
