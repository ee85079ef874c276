"""Sources of text: WikiText-103, the bundled sample, resumable downloads.

Everything is stored in the cache directory, `$DEBERTA_CACHE` or `~/.cache/DeBERTa`.
"""

import contextlib
import http.client
import json
import lzma
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from tqdm import tqdm

from DeBERTa.config import find_experiments
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.download import fetch_from_hub
from DeBERTa.errors import DataError, DebertaError, DownloadError
from DeBERTa.files import (
    CHUNK_BYTES,
    commit,
    get_cache_dir,
    hash_file,
    is_recorded,
    open_atomic,
    open_partial,
    raise_storage_errors,
    read_chunks,
)

SPLITS = ("train", "valid", "test")
USER_AGENT = "DeBERTa-pretraining/1.0"
TIMEOUT_SECONDS = 30
MAX_CONNECTIONS = 5  # per URL, as long as each connection receives data


@dataclass
class Download:
    """A file on the network.

    Attributes:
        name: the name of the file in messages.
        urls: the URLs to try, in order.
        sha256: SHA-256 of the file in hexadecimal.
    """

    name: str
    urls: tuple[str, ...]
    sha256: str


WIKITEXT_103 = Download(
    name="WikiText-103",
    urls=(
        *filter(None, [os.environ.get("DEBERTA_WIKITEXT_URL")]),
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
    ),
    sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
)
SAMPLE = find_experiments() / "sample" / "state_of_the_union.txt.xz"
SAMPLE_HELD_OUT = 10  # addresses in the test split, and as many before them in the validation split


def fetch(download: Download, destination: Path) -> Path:
    """Download a file to `destination` unless it exists; return that path.

    An interrupted download resumes from `destination` + `.part`.

    Raises `DownloadError`, naming every URL and its failure, if none served the file. Raises `DownloadError`
    also if another file is at `destination`. Raises `StorageError` if the file cannot be written.
    """
    if _is_fetched(download, destination):
        return destination
    failures = []
    with open_partial(destination, is_resumed=True) as file:
        if _is_fetched(download, destination):  # by the process that held the lock
            return destination
        for url in download.urls:
            try:
                _transfer(url, file, download)
            except (OSError, http.client.HTTPException, ValueError) as error:
                is_answer = isinstance(error, urllib.error.HTTPError)  # "HTTP Error 404: Not Found"
                reason = error if is_answer else getattr(error, "reason", error)
                failures.append(f"  {url}: {str(reason) or type(error).__name__}\n")
                continue
            commit(file, destination)
            return destination
    raise DownloadError(
        f"cannot fetch {download.name}: no address served it\n{''.join(failures)}"
        f"put the file at {destination} by hand"
    )


def _is_fetched(download: Download, destination: Path) -> bool:
    if not destination.is_file():
        return False
    if hash_file(destination) != download.sha256:
        raise DownloadError(
            f"{destination} is not {download.name}: its SHA-256 is not {download.sha256}; "
            "remove it to have it fetched, or put the right file there"
        )
    return True


def _transfer(url: str, file: BinaryIO, download: Download) -> None:
    """Download a file, resuming after the bytes of `file`.

    Raises `ValueError` if the SHA-256 of the file differs.
    """
    earlier_bytes = _get_size(file)
    for connection in range(1, MAX_CONNECTIONS + 1):
        before = _get_size(file)
        try:
            _receive(url, file, download.name)
            break
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not before:
                raise
            break  # there are no more bytes: the SHA-256 says whether the earlier ones are right
        except (OSError, http.client.HTTPException):
            if _get_size(file) <= before or connection == MAX_CONNECTIONS:
                raise
    if hash_file(Path(file.name)) != download.sha256:
        file.truncate(0)
        if not earlier_bytes:
            raise ValueError("the file there has another SHA-256")
        _transfer(url, file, download)  # the earlier bytes were of another file: start over


def _receive(url: str, file: BinaryIO, name: str) -> None:
    """Append the data of one connection to `file`.

    The file is truncated first if the server does not send only the remainder.
    """
    size = _get_size(file)
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={size}-"} if size else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        is_continuation = response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or not is_continuation:
            file.truncate(0)
            size = 0
        length = response.headers.get("Content-Length")
        total = size + int(length) if length else None
        with tqdm(desc=f"fetching {name}", initial=size, total=total, unit="B", unit_scale=True) as bar:
            try:
                while chunk := response.read(CHUNK_BYTES):
                    with raise_storage_errors(Path(file.name)):
                        file.write(chunk)
                    bar.update(len(chunk))
            finally:
                file.flush()
    if total is not None and _get_size(file) < total:
        raise ConnectionError(f"the connection ended after {_get_size(file)} of {total} bytes")


def _get_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def fetch_vocabulary() -> Path:
    """Return the published vocabulary of 128,000 pieces; fetch it if needed.

    Raises `DownloadError` if it is not in the cache and cannot be fetched from the hub.
    """
    path = get_cache_dir() / "deberta-v3-base" / "spm.model"
    if not path.is_file():
        hint = f"put the file at {path} by hand"
        fetched = fetch_from_hub("hf:microsoft/deberta-v3-base", ("spm.model",), hint)
        Tokenizer(fetched)
        with fetched.open("rb") as source, open_atomic(path) as file:
            shutil.copyfileobj(source, file)
    return path


def fetch_wikitext(archive: Path | None = None) -> dict[str, Path]:
    """Return the texts of WikiText-103 by split; fetch and extract them if needed.

    `archive`: the published zip file; None: it is fetched. Raises `DataError` if the archive is missing,
    damaged or cannot be fetched.
    """
    directory = get_cache_dir() / "wikitext-103"
    texts = {split: directory / "text" / f"wiki.{split}.tokens" for split in SPLITS}
    if archive is None:
        if all(text.is_file() for text in texts.values()):
            return texts
        archive = fetch(WIKITEXT_103, directory / "wikitext-103-v1.zip")
    elif not archive.is_file():
        raise DataError(f"no archive {archive}: it does not exist; check --wikitext")
    return _extract_once(archive, texts, _extract_wikitext)


def extract_sample() -> dict[str, Path]:
    """Return the texts of the bundled sample by split; extract them if needed.

    The last 10 addresses are the test split, the 10 before them the validation split, all others the training
    split. Raises `DataError` if the sample is missing.
    """
    if not SAMPLE.is_file():
        raise DataError(f"no bundled sample {SAMPLE}: the repository is not complete; check it out again")
    directory = get_cache_dir() / "sample" / "text"
    return _extract_once(SAMPLE, {split: directory / f"{split}.txt" for split in SPLITS}, _extract_sample)


def _extract_once(
    source: Path, texts: dict[str, Path], extract: Callable[[Path, dict[str, Path]], None]
) -> dict[str, Path]:
    """Return the texts; extract them from `source` if needed.

    `source.json` records the SHA-256 of the source that they were extracted from.
    """
    record, values = texts["train"].with_name("source.json"), {"sha256": hash_file(source)}

    def is_extracted() -> bool:
        return all(text.is_file() for text in texts.values()) and is_recorded(record, values)

    if not is_extracted():
        with open_partial(record) as file:
            if not is_extracted():  # by the process that held the lock
                extract(source, texts)
                file.write(json.dumps(values).encode())
                commit(file, record)
    return texts


def _extract_wikitext(archive: Path, texts: dict[str, Path]) -> None:
    """Write the three texts of the zip file, and no other member."""
    with _raise_archive_errors(archive), zipfile.ZipFile(archive) as container:
        members = {f"wikitext-103/{text.name}": text for text in texts.values()}
        missing = ", ".join(sorted(members.keys() - set(container.namelist())))
        if missing:
            raise DataError(f"{archive} is not WikiText-103: it has no {missing}; fetch it again")
        for member, text in members.items():
            with container.open(member) as source, open_atomic(text) as file:
                file.writelines(_read_member(archive, source))


def _read_member(archive: Path, source: IO[bytes]) -> Iterator[bytes]:
    with _raise_archive_errors(archive):
        yield from read_chunks(source)


@contextlib.contextmanager
def _raise_archive_errors(archive: Path) -> Iterator[None]:
    """Raise `DataError` for what `zipfile` raises.

    It has classes of their own for encrypted and damaged files, unknown methods, and each decompressor.
    """
    try:
        yield
    except DebertaError:
        raise
    except Exception as error:
        raise DataError(f"cannot read the zip file {archive}: {error}; fetch it again") from error


def _extract_sample(archive: Path, texts: dict[str, Path]) -> None:
    text = lzma.decompress(archive.read_bytes())
    starts = [match.start() for match in re.finditer(rb"^ = [^=].* = $", text, re.MULTILINE)]
    valid, test = starts[-2 * SAMPLE_HELD_OUT], starts[-SAMPLE_HELD_OUT]
    for split, content in zip(SPLITS, (text[:valid], text[valid:test], text[test:]), strict=True):
        with open_atomic(texts[split]) as file:
            file.write(content)
