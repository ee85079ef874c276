"""What determines the results of a run besides its settings: the code of the package, libraries."""

import os
import shutil
import subprocess
import sys

from DeBERTa.training.banner import describe_code
from tests.commands import Command, find_free_port, get_cluster, make_two_process_flags
from tests.conftest import ROOT


def test_only_regular_files_are_code(tmp_path):
    """The lock of an editor is a link that leads nowhere."""
    shutil.copytree(ROOT / "DeBERTa", tmp_path / "DeBERTa")
    (tmp_path / "DeBERTa" / ".#train.py").symlink_to("user@host.1234")
    (tmp_path / "DeBERTa" / "folder.py").mkdir()
    python = "from DeBERTa.training.banner import describe_code; print(describe_code()['package_sha256'])"
    done = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == describe_code()["package_sha256"], done.stderr


def test_nodes_with_different_code_do_not_train_together(tmp_path, prepared):
    """Both end with an error that names the difference."""
    shutil.copytree(ROOT / "DeBERTa", tmp_path / "DeBERTa")
    with (tmp_path / "DeBERTa" / "model" / "losses.py").open("a") as file:
        file.write("GROUP = GROUP\n")
    flags, port = make_two_process_flags(tmp_path, prepared) | {"nproc_per_node": 1}, find_free_port()
    nodes = [
        Command(
            flags | {"output_dir": tmp_path / f"run-{node}"},
            checkout=checkout,
            **get_cluster(port, node=node),
        )
        for node, checkout in enumerate((ROOT, tmp_path))
    ]
    here = describe_code()["package_sha256"]
    for node in nodes:
        error = node.finish_with_error()
        assert f"ranks 0 and 1 differ in package_sha256 ({here} and " in error
        assert "start the same command with the same package" in error
