"""Compressed streams that follow each other; tests/data/test_sources.py has all formats."""

import bz2
import io
import lzma
from pathlib import Path

import pytest

from DeBERTa.data.compression import DECOMPRESSION_ERRORS, open_compressed

PARTS = [b"".join(b"%d %d.\n" % (part, number) for number in range(9000)) for part in range(4)]


def read(data: bytes) -> bytes:
    stream, _ = open_compressed(Path("file"), data[:512], io.BytesIO(data[512:]))
    return stream.read()


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
@pytest.mark.parametrize("zeros", [0, 4, 100_000])
def test_streams_one_after_the_other(compress, zeros):
    data = b"".join(compress(part) + bytes(zeros) for part in PARTS)
    assert read(data) == b"".join(PARTS)


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
def test_damage_in_a_later_stream_is_an_error(compress):
    """In the header of the second stream, behind it, and at the end of the file."""
    streams = [compress(part) for part in PARTS]
    second = len(streams[0])
    for place in (0, 3, 9, 200):
        data = bytearray(b"".join(streams))
        data[second + place] ^= 255
        with pytest.raises(DECOMPRESSION_ERRORS):
            read(bytes(data))
    for end in (second + 5, second + 300, sum(map(len, streams)) - 3):
        with pytest.raises(EOFError, match="it ends too early"):
            read(b"".join(streams)[:end])
