"""Files of the hub from a local server: the right file or one sentence, and nothing half-written is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from DeBERTa.download import REVISIONS
from tests.conftest import ROOT
from tests.hub.server import COMMIT, Hub, run_hub

CONTENT = bytes(range(256)) * 4000
CODE = """
import sys
from DeBERTa.errors import DebertaError
from DeBERTa.download import fetch_from_hub
try:
    print(fetch_from_hub(sys.argv[1], sys.argv[2:], "give a file"))
except DebertaError as error:
    sys.exit(f"error: {error}")
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def running():
    with run_hub() as hub:
        yield hub


@pytest.fixture
def hub(running) -> Hub:
    running.__dict__.update(files={"model.bin": CONTENT}, failure="", interruptions=1, requests=[])
    running.repositories, running.revisions = {"owner/name"}, set()
    return running


def fetch(hub: Hub, cache: Path, reference: str, *names: str, **environment: str):
    """Run `fetch_from_hub` in a process of its own: its variables are read when the package is imported."""
    return subprocess.run(
        [sys.executable, "-c", CODE, reference, *names],
        cwd=ROOT,
        env=os.environ | hub.build_environment(cache) | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_fetched(result) -> None:
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == CONTENT


def assert_refused(result, *named: str) -> None:
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in result.stderr
    for name in named:
        assert name in error


def test_fetched_once_and_then_from_the_cache(hub, tmp_path):
    hub.revisions = {COMMIT}
    for reference in ("hf:owner/name", f"hf:owner/name@{COMMIT}"):
        assert_fetched(fetch(hub, tmp_path, reference, "model.bin"))
    assert [r[0] for r in hub.requests] == ["HEAD", "GET"]
    assert_fetched(fetch(hub, tmp_path, "hf:owner/name", "model.bin", HF_HUB_OFFLINE="1"))
    # Offline, the cache does not know whether there is another file.
    names = ("model.safetensors", "model.bin")
    assert_fetched(fetch(hub, tmp_path, "hf:owner/name", *names, HF_HUB_OFFLINE="1"))
    assert len(hub.requests) == 2


def test_the_first_of_several_names(hub, tmp_path):
    assert_fetched(fetch(hub, tmp_path, "hf:owner/name", "model.safetensors", "model.bin"))
    result = fetch(hub, tmp_path, "hf:owner/name", "a.bin", "b.bin")
    assert_refused(result, "hf:owner/name has no a.bin and no b.bin; give a file")


def test_published_models_have_pinned_revisions(hub, tmp_path):
    (repository, revision), *_ = REVISIONS.items()
    hub.repositories, hub.revisions = {repository}, {revision}
    assert_fetched(fetch(hub, tmp_path, f"hf:{repository}", "model.bin"))
    assert {r[1] for r in hub.requests} == {f"/{repository}/resolve/{revision}/model.bin"}
    assert_fetched(fetch(hub, tmp_path, f"hf:{repository}@main", "model.bin"))


def test_redirects_are_followed(hub, tmp_path):
    hub.failure = "redirect"
    assert_fetched(fetch(hub, tmp_path, "hf:owner/name", "model.bin"))
    assert hub.requests[-1][:2] == ("GET", "/cdn/model.bin")


def test_an_interrupted_fetch_resumes(hub, tmp_path):
    """The client writes blocks of 10 MiB."""
    hub.failure, hub.files = "interrupt", {"model.bin": CONTENT * 24}
    result = fetch(hub, tmp_path, "hf:owner/name", "model.bin")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == CONTENT * 24
    assert [r[2] for r in hub.requests if r[0] == "GET"] == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("failure", ["wrong size", "wrong bytes"])
def test_another_file_than_announced_is_not_used(hub, tmp_path, failure):
    hub.failure = failure
    result = fetch(hub, tmp_path, "hf:owner/name", "model.bin")
    assert_refused(result, "model.bin of hf:owner/name")
    result = fetch(hub, tmp_path, "hf:owner/name", "model.bin", HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    if failure == "wrong bytes":
        stored = result.stderr.rpartition("remove ")[2].split()[0]
        Path(stored).unlink()
    hub.failure = ""
    assert_fetched(fetch(hub, tmp_path, "hf:owner/name", "model.bin"))


@pytest.mark.parametrize(
    ("reference", "failure", "named"),
    [
        ("hf:owner/other", "", "no such model"),
        ("hf:owner/name@v9", "", "no such revision; check what follows the @"),
        ("hf:a/b/c", "", "not the name of a model"),
        ("hf:", "", "not the name of a model"),
        ("hf:owner/name", "portal", "HF_ENDPOINT"),
    ],
)
def test_failures_are_one_sentence(hub, tmp_path, reference, failure, named):
    hub.failure = failure
    assert_refused(fetch(hub, tmp_path, reference, "model.bin"), f"model.bin of {reference}: ", named)


def test_offline(hub, tmp_path):
    result = fetch(hub, tmp_path, "hf:owner/name", "model.bin", HF_HUB_OFFLINE="1")
    assert_refused(result, "it is not in the cache; unset HF_HUB_OFFLINE once, or give a file")
    assert not hub.requests


def test_without_a_network(hub, tmp_path):
    """The hub is asked for the first name alone: the package tries it six times, within 23 seconds."""
    environment = hub.build_environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", f"import time\ntime.sleep = print\n{CODE}", "hf:owner/name", "a.bin", "b.bin"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(result, "a.bin of hf:owner/name: ", "check the connection to http://127.0.0.1:9")
    assert result.stderr.count("/resolve/main/a.bin") == 6
    assert "b.bin" not in result.stderr


def test_without_the_package(hub, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not installed')")
    result = fetch(hub, tmp_path, "hf:owner/name", "model.bin", PYTHONPATH=str(tmp_path))
    assert_refused(
        result, "the package huggingface_hub is missing; pip install huggingface_hub, or give a file"
    )
