"""Run every command of the README and docs/ that has no reason not to be, at a reduced size, in their order.

A workspace has the files that the commands name. In it, `mlm.sh` and `rtd.sh` add flags for a small model,
two steps and the bundled sample; a local server stands for the Hugging Face hub. The commands themselves are
run as they are written, except for what SMALLER replaces.
"""

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from DeBERTa.download import REVISIONS
from tests.conftest import ROOT
from tests.documented import FENCED, extract_all, find_reason
from tests.hub.server import run_hub

PATIENCE = 600  # seconds
SMALLER = {
    "--step 500000": "--step 2",
    "--step 15000": "--step 2",
    "--valid_fraction 0.01": "--valid_fraction 0.2",
    "--train_vocab 32000": "--train_vocab 500",
    "output/TAG": "output/one",
    "X-continue": "xsmall-continue",
}
OPTIONAL = {
    "--png": "matplotlib",
    ".parquet": "pyarrow",
    "hf:": "huggingface_hub",
    "-continue": "huggingface_hub",
}
CONFIGS = {"mlm": "deberta_tiny.json", "rtd": "rtd_tiny.json"}
FLAGS = "--fresh --num_training_steps 2 --warmup 1 --dump_interval 2 --train_batch_size 8 --workers 0"
SCRIPT = """#!/bin/bash
[[ " $* " == *" --help"* ]] || set -- "$@" --model_config {config} {flags}
[[ " $* " == *" --data_dir "* || " $* " == *" --vocab_path "* ]] || export DATA=sample
exec {root}/{name}.sh "$@"
"""
COMMANDS = [(page, command) for page, command in extract_all() if find_reason(command) is None]


def run(command: str, workspace: Path, environment: dict[str, str]) -> None:
    """Run a command as a shell does, and require that it succeeds."""
    for written, smaller in SMALLER.items():
        command = command.replace(written, smaller)
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    assert "Traceback" not in result.stderr


def write_texts(workspace: Path) -> None:
    """Write the texts that commands name: 400 documents in several files and formats."""
    with lzma.open(ROOT / "experiments" / "sample" / "state_of_the_union.txt.xz") as file:
        lines = [line for line in file.read(1_500_000).decode(errors="ignore").split("\n") if len(line) > 40]
    text = "\n\n".join(lines[:1200])
    for folder in ("my_texts", "more", "dir", "shards"):
        (workspace / folder).mkdir()
    for name in ("A.txt", "my_texts/one.txt", "dir/two.txt"):
        (workspace / name).write_text(text, encoding="utf-8")
    code = """
import gzip, json, sys
import pyarrow, pyarrow.parquet
texts = open("A.txt", encoding="utf-8").read().split("\\n\\n")[:200]
rows = "".join(json.dumps({"text": text}) + "\\n" for text in texts).encode()
for name in ("B.jsonl.gz", "more/three.jsonl.gz"):
    with gzip.open(name, "wb") as file:
        file.write(rows)
pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "shards/four.parquet")
"""
    subprocess.run([sys.executable, "-c", code], cwd=workspace, check=True)


def write_scripts(workspace: Path) -> None:
    """Write the entry points: links, and scripts that make a command smaller."""
    for name in ("prepare_data.py", "experiments", "DeBERTa", "benchmarks"):
        (workspace / name).symlink_to(ROOT / name)
    for name, config in CONFIGS.items():
        path = workspace / f"{name}.sh"
        path.write_text(SCRIPT.format(name=name, config=config, flags=FLAGS, root=ROOT))
        path.chmod(0o755)


@pytest.fixture(scope="module")
def prepared_workspace(tmp_path_factory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a directory where the commands run, and their environment variables."""
    workspace = tmp_path_factory.mktemp("workspace")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with run_hub() as hub:
        environment = (
            os.environ | hub.build_environment(workspace / "hub") | {"PATH": path, "OMP_NUM_THREADS": "1"}
        )
        environment |= {"DEBERTA_CACHE": str(workspace / "cache"), "PYTHONPATH": str(ROOT)}
        write_scripts(workspace)
        write_texts(workspace)
        for tag in ("./mlm.sh deberta-tiny --tag earlier", "./rtd.sh deberta-v3-tiny"):
            run(tag, workspace, environment)
        for name in ("one", "two"):
            shutil.copytree(workspace / "output" / "earlier", workspace / "output" / name)
        published = "python -m DeBERTa.export output/deberta-v3-tiny --published-format --output hub-files"
        run(published, workspace, environment)
        hub.files = {path.name: path.read_bytes() for path in (workspace / "hub-files").iterdir()}
        hub.repositories, hub.revisions = set(REVISIONS), set(REVISIONS.values())
        shutil.copy(workspace / "cache" / "sample" / "spm.model", workspace)
        for folder in ("NEW", "OLD"):
            shutil.copytree(workspace / "cache" / "sample" / "128", workspace / folder)
        yield workspace, environment


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=f"{page.stem}: {command}") for page, command in COMMANDS]
)
def test_command(command, prepared_workspace):
    for part, package in OPTIONAL.items():
        if part in command:
            pytest.importorskip(package)
    run(command, *prepared_workspace)


def test_python_of_the_export_page(prepared_workspace):
    """All its blocks, one after the other, on the models that its commands exported."""
    pytest.importorskip("transformers")
    workspace, environment = prepared_workspace
    run("python -m DeBERTa.export output/deberta-v3-tiny --output models", workspace, environment)
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = [block for language, block in FENCED.findall(page) if language == "python"]
    assert blocks
    inputs = "import torch\ninput_ids = torch.ones(1, 5, dtype=torch.int64)\ninput_mask = input_ids\n"
    (workspace / "page.py").write_text("\n".join([inputs, *blocks]))
    run("python page.py", workspace, environment)
