"""What determines the results of a run besides its settings: the code of the package, libraries."""

import shutil

from DeBERTa.training.banner import describe_code
from tests.commands import Command, cluster, free_port, two_process_flags
from tests.conftest import ROOT


def test_nodes_with_different_code_do_not_train_together(tmp_path, prepared):
    """Both end with an error that names the difference."""
    shutil.copytree(ROOT / "DeBERTa", tmp_path / "DeBERTa")
    with (tmp_path / "DeBERTa" / "model" / "losses.py").open("a") as file:
        file.write("GROUP = GROUP\n")
    flags, port = two_process_flags(tmp_path, prepared) | {"nproc_per_node": 1}, free_port()
    nodes = [
        Command(
            flags | {"output_dir": tmp_path / f"run-{node}"},
            checkout=checkout,
            **cluster(port, node=node),
        )
        for node, checkout in enumerate((ROOT, tmp_path))
    ]
    here = describe_code()["package_sha256"]
    for node in nodes:
        error = node.error()
        assert f"ranks 0 and 1 differ in package_sha256 ({here} and " in error
        assert "start the same command with the same package" in error
