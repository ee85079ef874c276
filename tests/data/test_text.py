"""Documents of text and of records."""

import json

import pytest

from DeBERTa.errors import DataError
from tests.data.test_sources import read, write_parquet


def test_documents_of_records(tmp_path):
    """Line ends within, no text, a long record, a byte order mark, and no line end at the end."""
    long = "word " * 5000
    records = [{"text": "a\nb"}, {"text": None}, {"text": ""}, {"text": long}, {"text": "\u2028 ü"}]
    lines = "\n\n".join(
        json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(records)
    )
    (tmp_path / "i").write_text("\ufeff" + lines)
    assert read(tmp_path / "i") == ["a\nb", long.strip(), "\u2028 ü".strip()]
    (tmp_path / "p").write_bytes(write_parquet([record["text"] for record in records]))
    assert read(tmp_path / "p") == ["a\nb", long.strip(), "\u2028 ü".strip()]
    assert read(tmp_path / "i", column="", has_documents=False)[0].startswith('{"text": "a')


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\ntwo\n\nthree\n \t\n\n four \n", ["one\ntwo", "three", "four"]),
        ("one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("".join(f"{n}\n{n}.\n \t \n" for n in range(500)), [f"{n}\n{n}." for n in range(500)]),
        ('{"not": "text"} is how JSON looks\n{\n', ['{"not": "text"} is how JSON looks', "{"]),
        ("", []),
    ],
)
def test_documents_of_text(tmp_path, text, documents):
    (tmp_path / "i").write_bytes(text.encode())
    assert read(tmp_path / "i") == documents


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text": 7}\n', r"no text in the field 'text' \(fields: text\); pass --column"),
        (b'{"body": "a"}\n', r"no text in the field 'text' \(fields: body\); pass --column"),
        (b'{"text": "a"}\n{"text": "b\n', """, at '{"text": "b': a line is not JSON"""),
        (b'{"text": ' + b"[" * 99_999 + b"\n", "is not JSON"),
        (b'{"text": "a"}\n' + b"[" * 99_999 + b"\n", "is not JSON"),
        (b'{"text": "a"}\n[1]\n', "no text in the field"),
        (b'{"text": "\\ud800"}\n', "surrogate"),
        (b'[{"text": "a"},\n {"text": "b"}]\n', "is one JSON value, .*--column ''"),
        (b'{\n "text": "a"\n}\n', "is one JSON value, .*--column ''"),
    ],
)
def test_records_that_are_refused(tmp_path, content, complaint):
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read(tmp_path / "i")
