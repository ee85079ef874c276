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
        (b'[{"text": "a"},\n {"text": "b"}]\n', "is JSON, but not one value per line; .*--column ''"),
        (b'{\n "text": "a"\n}\n', "is JSON, but not one value per line; .*--column ''"),
        (b'{"text": "a",\n "id": 1}\n', "is JSON, but not one value per line"),
        (b'{"text": "a"},\n{"text": "b"},\n', "is JSON, but not one value per line"),
        (b'{"text": "a"\n}\n{"text": "b"}\n', "is JSON, but not one value per line"),
        (b'{"text":\n"a"}\n', "is JSON, but not one value per line"),
        (b'{"text": "a"} {"text": "b"}\n', "is JSON, but not one value per line"),
        (b'["a", "b"]\n', "is JSON, but not one value per line"),
        (b'[\n "a",\n "b"\n]\n', "is JSON, but not one value per line"),
    ],
)
def test_records_that_are_refused(tmp_path, content, complaint):
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read(tmp_path / "i")


def test_long_records_with_a_space_after_the_brace(tmp_path):
    """The first record is longer than what is read to find the kind of the file."""
    texts = ["wort " * 300_000, "b"]
    (tmp_path / "i").write_text("".join('{ "text": ' + json.dumps(text) + "}\n" for text in texts))
    assert read(tmp_path / "i") == [text.strip() for text in texts]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block_bytes", [7, 8, 9, 10, 1000])
def test_documents_do_not_depend_on_line_ends(tmp_path, end, block_bytes):
    text = "A1\nA2\n\nB1\n \t\nC1\nC2\n\n\nD\n"
    (tmp_path / "i").write_bytes(text.replace("\n", end).encode())
    found = [document.replace("\r", "\n") for document in read(tmp_path / "i", block_bytes=block_bytes)]
    expected = ["A1\nA2", "B1", "C1\nC2", "D"]
    if block_bytes < 1000:  # documents are cut where they are longer than a block
        assert [line for document in found for line in document.split()] == "\n".join(expected).split()
    else:
        assert found == expected
