"""Which PyTorch `set_up_python` of experiments/common.sh installs, from local indexes with small packages.

PyTorch's real index was not tried: not every machine reaches it.
"""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Where a package is not on an index, its page is missing: both indexes have torch, one has the other package.
BUILDS = {"cpu": ["torch-2.13.0+cpu"], "ordinary": ["torch-2.13.0", "huggingface_hub-2.4.0"]}
PATIENCE = 120  # seconds


def write_wheel(folder: Path, release: str) -> None:
    """Write a package of one module that has its version."""
    name, version = release.split("-")
    folder = folder / name.replace("_", "-")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = f"{release}.dist-info"
    with zipfile.ZipFile(folder / f"{release}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{metadata}/RECORD", "")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Serve both indexes: a directory per package, whose listing links to its files."""
    folder = tmp_path_factory.mktemp("indexes")
    for index, releases in BUILDS.items():
        for release in releases:
            write_wheel(folder / index, release)
    handler = partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Return a directory with what `set_up_python` reads, and bin/python without torch."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("sample"))
    (tmp_path / "requirements.txt").write_text("torch==2.13.0  # of a size\n")
    shutil.copy(ROOT / "requirements-hub.txt", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "plain"], check=True)
    return tmp_path


def start_set_up(checkout: Path, address: str, **environment: str) -> subprocess.Popen:
    """Start `set_up_python`, and then printing the version of torch in the new environment."""
    script = (
        'set -euo pipefail; source "$ROOT/experiments/common.sh"; set_up_python "$ROOT/requirements.txt"; '
    )
    script += '"$PYTHON" -c "import torch; print(torch.__version__)"'
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    variables |= {"ROOT": str(checkout), "PATH": f"{checkout / 'plain' / 'bin'}{os.pathsep}/usr/bin:/bin"}
    variables |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{address}/ordinary", "no_proxy": "*"}
    return subprocess.Popen(
        ["bash", "-c", script],
        env=variables | {"TORCH_CPU_INDEX": f"{address}/cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Return the version of torch, and the messages."""
    printed, messages = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, messages
    return printed.strip(), messages


def set_up(checkout: Path, address: str, **environment: str) -> tuple[str, str]:
    return finish(start_set_up(checkout, address, **environment))


def test_cpu_build_without_a_gpu(checkout, address):
    version, messages = set_up(checkout, address)
    assert version == "2.13.0+cpu"
    assert f"CPU build (200 MB to download, 0.8 GB installed) from {address}/cpu" in messages
    assert "cannot be had" not in messages


@pytest.mark.parametrize("index", ["http://127.0.0.1:9", "{address}/nothing"])
def test_ordinary_build_where_the_index_fails(checkout, address, index):
    """A closed port, and an index without torch."""
    started = time.monotonic()
    version, messages = set_up(checkout, address, TORCH_CPU_INDEX=index.format(address=address))
    assert version == "2.13.0"
    assert "it cannot be had there; taking the build for NVIDIA GPUs" in messages
    assert time.monotonic() - started < PATIENCE


def test_ordinary_build_with_a_gpu(checkout, address):
    """A program named nvidia-smi that succeeds is what a machine with a GPU has."""
    program = checkout / "plain" / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    version, messages = set_up(checkout, address)
    assert version == "2.13.0"
    assert "CPU build" not in messages


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock, of util-linux, is not installed")
def test_tasks_that_start_together_share_a_checkout(checkout, address):
    """The first one makes the environment, and the others wait for it and use it."""
    processes = [start_set_up(checkout, address) for _ in range(3)]
    results = [finish(process) for process in processes]
    assert [version for version, _ in results] == ["2.13.0+cpu"] * 3
    assert sum("installing into" in messages for _, messages in results) == 1
    assert sum("another process may be filling" in messages for _, messages in results) == 2
