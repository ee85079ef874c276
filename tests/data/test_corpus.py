"""Downloads from a local server, archives, and the splits of the bundled sample."""

import hashlib
import http.server
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from DeBERTa.data import corpus
from DeBERTa.data.corpus import Download, DownloadError, extract_sample, fetch, fetch_wikitext
from DeBERTa.download import REVISIONS
from DeBERTa.errors import DataError
from tests.hub.server import Hub, run_hub

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "prepare"
CONTENT = bytes(range(256)) * 20_000  # 5 MB
UNREACHABLE = "http://127.0.0.1:9/nothing"  # the port of the discard service, where nothing listens


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; the path selects a failure.

    Refuses the user agent of urllib, as real hosts do.
    """

    def do_GET(self):
        content = self.server.content
        self.server.ranges.append((self.path, self.headers.get("Range")))
        if self.path == "/forbidden" or self.headers["User-Agent"].startswith("Python-urllib"):
            self.send_error(403)
            return
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.path != "/without-ranges":
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_incomplete = (self.path == "/incomplete" and start < 4_000_000) or self.path == "/nothing"
        self.wfile.write(body[: (2_000_000 if self.path == "/incomplete" else 0)] if is_incomplete else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content = CONTENT
        running.ranges = []
        running.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEBERTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def download(*urls: str, content: bytes = CONTENT) -> Download:
    return Download("the file", urls, hashlib.sha256(content).hexdigest())


def test_fetches_and_then_needs_no_network(server, tmp_path):
    destination = tmp_path / "new" / "file"
    assert fetch(download(server.address + "/plain"), destination) == destination
    assert destination.read_bytes() == CONTENT
    assert [path.name for path in destination.parent.iterdir()] == ["file"]
    fetch(download(UNREACHABLE), destination)
    assert len(server.ranges) == 1


def test_the_next_address_is_tried(server, tmp_path):
    fetch(download(UNREACHABLE, server.address + "/forbidden", server.address + "/plain"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_interrupted_connection_resumes(server, tmp_path):
    fetch(download(server.address + "/incomplete"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [
        ("/incomplete", None),
        ("/incomplete", "bytes=2000000-"),
        ("/incomplete", "bytes=4000000-"),
    ]


def test_an_earlier_download_is_resumed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:3_000_000])
    fetch(download(server.address + "/plain"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [("/plain", "bytes=3000000-")]
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("left", [CONTENT[:3_000_000], CONTENT + b"more", b"of another file" * 1000])
@pytest.mark.parametrize("path", ["/plain", "/without-ranges"])
def test_clean_restart(server, tmp_path, left, path):
    """Servers without ranges, answers 416, and beginnings of another file."""
    (tmp_path / "file.part").write_bytes(left)
    fetch(download(server.address + path), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_file_is_removed(server, tmp_path):
    with pytest.raises(DownloadError, match="another SHA-256"):
        fetch(download(server.address + "/plain", content=b"something else"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_at_the_destination_is_named_and_not_replaced(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="remove it") as error:
        fetch(download(server.address + "/plain"), tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_error_names_every_address_and_the_destination(server, tmp_path):
    urls = (
        UNREACHABLE,
        server.address + "/forbidden",
        server.address + "/nothing",
        server.address + "/plain",
    )
    with pytest.raises(DownloadError) as error:
        fetch(download(*urls, content=b"something else"), tmp_path / "file")
    message = str(error.value)
    for url, reason in zip(
        urls, ("refused", "HTTP Error 403", "ended after 0", "another SHA-256"), strict=True
    ):
        assert re.search(f"{re.escape(url)}: .*{reason}", message)
    assert f"put the file at {tmp_path / 'file'}" in message


def fetch_vocabulary(hub: Hub, tmp_path: Path) -> subprocess.CompletedProcess:
    code = "from DeBERTa.data.corpus import fetch_vocabulary; print(fetch_vocabulary())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | hub.build_environment(tmp_path / "hub"),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_vocabulary_comes_from_the_hub(tmp_path, cache):
    with run_hub() as hub:
        repository = "microsoft/deberta-v3-base"
        hub.repositories, hub.revisions = {repository}, {REVISIONS[repository]}
        result = fetch_vocabulary(hub, tmp_path)
        destination = cache / "deberta-v3-base" / "spm.model"
        assert result.stderr.splitlines()[-1].endswith(
            f"has no spm.model; put the file at {destination} by hand"
        )
        hub.files["spm.model"] = (GOLDEN / "spm.model").read_bytes()
        for _ in range(2):
            result = fetch_vocabulary(hub, tmp_path)
            assert result.stdout.strip() == str(destination), result.stderr
        assert destination.read_bytes() == hub.files["spm.model"]
        assert [r[0] for r in hub.requests] == ["HEAD", "HEAD", "GET"]
        destination.unlink()
        hub.files["spm.model"] = b"not a vocabulary"
        shutil.rmtree(tmp_path / "hub")
        result = fetch_vocabulary(hub, tmp_path)
        assert "is not a SentencePiece model" in result.stderr.splitlines()[-1]
        assert not destination.exists()


def write_archive(path: Path, **texts: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as container:
        for split, text in texts.items():
            container.writestr(f"wikitext-103/wiki.{split}.tokens", text)
        container.writestr("wikitext-103/../../evil.txt", "no")
        container.writestr("wikitext-103/README", "no")
    return path


def test_wikitext_from_a_local_archive(tmp_path):
    texts = fetch_wikitext(write_archive(tmp_path / "a.zip", train="1\n", valid="2\n", test="3\n"))
    assert [texts[split].read_text() for split in ("train", "valid", "test")] == ["1\n", "2\n", "3\n"]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    directory = "cache/wikitext-103/text/"
    members = {directory + f"wiki.{split}.tokens" for split in ("train", "valid", "test")}
    assert files == {"a.zip", directory + "source.json", *members}

    times = {path: path.stat().st_mtime_ns for path in texts.values()}
    assert fetch_wikitext(tmp_path / "a.zip") == fetch_wikitext() == texts
    assert {path: path.stat().st_mtime_ns for path in texts.values()} == times

    fetch_wikitext(write_archive(tmp_path / "b.zip", train="4\n", valid="5\n", test="6\n"))
    assert texts["train"].read_text() == "4\n"


def test_wikitext_fetched(server, tmp_path, monkeypatch):
    server.content = write_archive(tmp_path / "a.zip", train="1\n", valid="2\n", test="3\n").read_bytes()
    monkeypatch.setattr(corpus.WIKITEXT_103, "urls", (server.address + "/plain",))
    with pytest.raises(DownloadError, match="another SHA-256"):
        fetch_wikitext()
    monkeypatch.setattr(corpus.WIKITEXT_103, "sha256", hashlib.sha256(server.content).hexdigest())
    assert fetch_wikitext()["test"].read_text() == "3\n"


def test_archives_that_are_not_wikitext(tmp_path):
    with pytest.raises(DataError, match=r"no wikitext-103/wiki\.test\.tokens"):
        fetch_wikitext(write_archive(tmp_path / "a.zip", train="1", valid="2"))
    (tmp_path / "b.zip").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="cannot read the zip file"):
        fetch_wikitext(tmp_path / "b.zip")
    complete = write_archive(tmp_path / "c.zip", train="1" * 10_000, valid="2", test="3").read_bytes()
    (tmp_path / "c.zip").write_bytes(complete.replace(complete[60:70], b"0123456789"))
    with pytest.raises(DataError, match="cannot read the zip file"):
        fetch_wikitext(tmp_path / "c.zip")
    with pytest.raises(DataError, match="no archive"):
        fetch_wikitext(tmp_path / "d.zip")
    assert not list(tmp_path.rglob("*.tokens"))


def test_foreign_and_damaged_archives_are_one_error(tmp_path):
    """Encrypted, of an unknown method, with damaged bzip2 and LZMA data, and with changed bytes."""
    texts = {"train": "1 " * 500, "valid": "2", "test": "3"}
    path = tmp_path / "a.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as container:
            for split, text in texts.items():
                container.writestr(f"wikitext-103/wiki.{split}.tokens", text)
        intact = path.read_bytes()
        central = intact.index(b"PK\1\2")
        for seed in range(60):
            generator, damaged = random.Random(seed), bytearray(intact)
            for _ in range(generator.choice([1, 3])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            if seed == 0:  # encrypted
                damaged[6] |= 1
                damaged[central + 8] |= 1
            if seed == 1:  # method 99
                damaged[8:10] = damaged[central + 10 : central + 12] = (99).to_bytes(2, "little")
            path.write_bytes(damaged)
            try:
                fetch_wikitext(path)
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017 (damage to what nothing reads is no error)
            else:
                assert seed > 1


def test_splits_of_the_sample():
    texts = extract_sample()
    contents = {split: path.read_text() for split, path in texts.items()}
    titles = {
        split: re.findall(r"^ = (.*) = $", content, re.MULTILINE) for split, content in contents.items()
    }
    assert {split: len(found) for split, found in titles.items()} == {"train": 213, "valid": 10, "test": 10}
    assert titles["train"][0].startswith("1790")
    assert titles["test"][-1].startswith("2021")
    assert all(content.startswith(" = ") for content in contents.values())
    assert "".join(contents.values()).encode() == lzma.decompress(corpus.SAMPLE.read_bytes())
    times = {path: path.stat().st_mtime_ns for path in texts.values()}
    assert {path: path.stat().st_mtime_ns for path in extract_sample().values()} == times


def test_addresses_come_from_the_environment():
    run = subprocess.run(
        [sys.executable, "-c", "from DeBERTa.data import corpus; print(corpus.WIKITEXT_103.urls[0])"],
        cwd=ROOT,
        env=os.environ | {"DEBERTA_WIKITEXT_URL": "http://127.0.0.1:9/mirror.zip"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["http://127.0.0.1:9/mirror.zip"]
