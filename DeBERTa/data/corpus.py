"""Where text comes from: WikiText-103, the bundled sample, and downloads that can be cut off and go on.

Everything is kept in the cache directory, `$DEBERTA_CACHE` or `~/.cache/DeBERTa`.
"""

import http.client
import json
import lzma
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from DeBERTa.config import find_experiments
from DeBERTa.data.files import (
    CHUNK_BYTES,
    get_cache_dir,
    get_partial_path,
    hash_file,
    open_atomic,
    open_partial,
)
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import DataError

SPLITS = ("train", "valid", "test")
USER_AGENT = "DeBERTa-pretraining/1.0"
TIMEOUT_SECONDS = 30
CONNECTIONS_PER_ADDRESS = 5  # a transfer that is cut off goes on as long as each connection brings something


class DownloadError(DataError):
    """A file that no address gave."""


@dataclass
class Download:
    """A file on the network.

    Attributes:
        name: what it is called in messages.
        urls: the addresses to try, in order.
        sha256: of the right file; None if it is not known.
    """

    name: str
    urls: tuple[str, ...]
    sha256: str | None


WIKITEXT_103 = Download(
    name="WikiText-103",
    urls=(
        *filter(None, [os.environ.get("DEBERTA_WIKITEXT_URL")]),
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
    ),
    sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
)
DEBERTA_V3_VOCABULARY = Download(
    name="the DeBERTa-V3 vocabulary",
    urls=(
        (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        + "/microsoft/deberta-v3-base/resolve/main/spm.model",
    ),
    sha256=None,
)
SAMPLE = find_experiments() / "sample" / "state_of_the_union.txt.xz"
SAMPLE_HELD_OUT = 10  # addresses in the test split, and as many before them in the validation split


def fetch(download: Download, destination: Path, check: Callable[[Path], object] | None = None) -> Path:
    """Bring a file to `destination`, unless it is there already, and return that path.

    The transfer goes to `destination` + `.part`, and goes on there if it was cut off. `check` looks at the complete
    file and raises ValueError if it is not the right one: for files whose SHA-256 is not known.

    Raises DownloadError, naming every address and its failure, if none gave the file; also if a file with another
    SHA-256 is at `destination`.
    """
    if _is_there(download, destination):
        return destination
    failures = []
    with open_partial(destination, resume=True) as file:
        if _is_there(download, destination):  # another process brought it meanwhile
            get_partial_path(destination).unlink()
            return destination
        for url in download.urls:
            try:
                _transfer(url, file, download)
                if check is not None:
                    check(get_partial_path(destination))
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f"  {url}: {_reason(error)}")
                if isinstance(error, ValueError):
                    file.truncate(0)
            else:
                get_partial_path(destination).replace(destination)
                return destination
        if _size(file) == 0:
            get_partial_path(destination).unlink()
    raise DownloadError(
        "\n".join(
            [f"Cannot fetch {download.name}. Tried:", *failures, f"Put the file at {destination} by hand."]
        )
    )


def _is_there(download: Download, destination: Path) -> bool:
    if not destination.is_file():
        return False
    if download.sha256 and hash_file(destination) != download.sha256:
        raise DownloadError(
            f"{destination} is not {download.name} (its SHA-256 is not {download.sha256}): "
            "remove it to have it fetched, or put the right file there."
        )
    return True


def _transfer(url: str, file: BinaryIO, download: Download) -> None:
    """Bring the whole file, going on after what `file` holds. Raises ValueError if it is the wrong one."""
    if download.sha256 is None:
        file.truncate(0)  # nothing would tell that two halves do not fit
    earlier_bytes = _size(file)
    for connection in range(1, CONNECTIONS_PER_ADDRESS + 1):
        before = _size(file)
        try:
            _receive(url, file, download.name)
            break
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException):
            if _size(file) <= before or download.sha256 is None or connection == CONNECTIONS_PER_ADDRESS:
                raise
    if download.sha256 is not None and hash_file(Path(file.name)) != download.sha256:
        file.truncate(0)
        if not earlier_bytes:
            raise ValueError("the file there has another SHA-256")
        _transfer(url, file, download)  # what an earlier run left was not of this file: from the start


def _receive(url: str, file: BinaryIO, name: str) -> None:
    """One connection: append what the server sends to `file`, or start over if it does not send the rest only."""
    have = _size(file)
    headers = {"User-Agent": USER_AGENT}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        file.truncate(0)
        _receive(url, file, name)
        return
    with response:
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or not continues:
            file.truncate(0)
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(desc=f"fetching {name}", initial=have, total=total, unit="B", unit_scale=True) as bar:
            try:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
            finally:
                file.flush()
                os.fsync(file.fileno())
    if total is not None and _size(file) < total:
        raise ConnectionError(f"the connection ended after {_size(file)} of {total} bytes")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def fetch_vocabulary() -> Path:
    """The published vocabulary of 128,000 pieces, fetched into the cache if it is not there."""
    return fetch(DEBERTA_V3_VOCABULARY, get_cache_dir() / "deberta-v3-base" / "spm.model", check=Tokenizer)


def fetch_wikitext(archive: Path | None = None) -> dict[str, Path]:
    """Text of WikiText-103 by split, extracted into the cache if it is not there.

    `archive`: the published zip file, fetched by hand; without it, it is fetched. Raises DataError.
    """
    folder = get_cache_dir() / "wikitext-103"
    members = {split: f"wikitext-103/wiki.{split}.tokens" for split in SPLITS}
    texts = {split: folder / "text" / f"wiki.{split}.tokens" for split in SPLITS}
    if archive is None and all(text.is_file() for text in texts.values()):
        return texts
    if archive is None:
        archive = fetch(WIKITEXT_103, folder / "wikitext-103-v1.zip")
    elif not archive.is_file():
        raise DataError(f"There is no archive {archive}.")
    record = folder / "text" / "source.json"
    fingerprint = hash_file(archive)
    if not _is_split(texts, record, fingerprint):
        with open_atomic(record) as file:
            if not _is_split(texts, record, fingerprint):  # another process may have done it meanwhile
                _extract(archive, {members[split]: texts[split] for split in SPLITS})
            file.write(json.dumps({"sha256": fingerprint}).encode())
    return texts


def extract_sample() -> dict[str, Path]:
    """Text of the bundled sample by split, written into the cache if it is not there.

    The last 10 addresses are the test split, the 10 before them the validation split, all others the training split.
    """
    if not SAMPLE.is_file():
        raise DataError(
            f"The bundled sample is missing from {SAMPLE}; run from a complete copy of the repository."
        )
    folder = get_cache_dir() / "sample" / "text"
    texts = {split: folder / f"{split}.txt" for split in SPLITS}
    record = folder / "source.json"
    fingerprint = hash_file(SAMPLE)
    if not _is_split(texts, record, fingerprint):
        with open_atomic(record) as file:
            if not _is_split(texts, record, fingerprint):
                _split_sample(lzma.decompress(SAMPLE.read_bytes()), texts)
            file.write(json.dumps({"sha256": fingerprint}).encode())
    return texts


def _split_sample(text: bytes, texts: dict[str, Path]) -> None:
    starts = [match.start() for match in re.finditer(rb"^ = [^=].* = $", text, re.MULTILINE)]
    valid, test = starts[-2 * SAMPLE_HELD_OUT], starts[-SAMPLE_HELD_OUT]
    for split, part in zip(SPLITS, (text[:valid], text[valid:test], text[test:]), strict=True):
        with open_atomic(texts[split]) as file:
            file.write(part)


def _is_split(texts: dict[str, Path], record: Path, fingerprint: str) -> bool:
    """Whether the texts are there and were made from the file of this SHA-256."""
    if not record.is_file() or not all(text.is_file() for text in texts.values()):
        return False
    try:
        return json.loads(record.read_text())["sha256"] == fingerprint
    except ValueError:
        return False


def _extract(archive: Path, destinations: dict[str, Path]) -> None:
    """Write these members of a zip file, and no others, to their destinations."""
    try:
        with zipfile.ZipFile(archive) as container:
            missing = destinations.keys() - set(container.namelist())
            if missing:
                raise DataError(f"{archive} is not WikiText-103: it has no {', '.join(sorted(missing))}.")
            for member, destination in destinations.items():
                with container.open(member) as source, open_atomic(destination) as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is not a complete zip file ({error}): fetch it again.") from error
