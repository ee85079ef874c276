"""Raw text in blocks, and the sentences that a vocabulary is trained on."""

import gzip

from DeBERTa.data.text import TextFile, read_training_sentences


def test_blocks_hold_all_text_and_end_well(tmp_path):
    content = (
        "Zeile mit Straße\r\n" * 50 + "漢字" * 400 + "\r" + "wort " * 500 + "x" * 900 + "\n\nend"
    ).encode()
    (tmp_path / "i").write_bytes(content)
    for block_bytes in (7, 64, 1000, len(content), len(content) + 1):
        blocks = list(TextFile(tmp_path / "i").read_blocks(block_bytes))
        assert b"".join(block for _, block in blocks) == content
        assert all(0 < len(block) <= block_bytes for _, block in blocks)
        assert [offset for offset, _ in blocks] == [
            sum(len(block) for _, block in blocks[:index]) for index in range(len(blocks))
        ]
        for _, block in blocks:
            block.decode()


def test_vocabularies_of_large_texts_see_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("DeBERTa.data.text.TRAINING_BYTES", 2 << 20)
    text = b"".join(b"%07d.\n" % number for number in range(1_000_000))
    for name, content in (("i", text), ("i.gz", gzip.compress(text, 1))):
        (tmp_path / name).write_bytes(content)
        numbers = [int(line[:7]) for line in read_training_sentences(tmp_path / name, "strict")]
        assert 1.8e6 < 9 * len(numbers) < 3.5e6
        assert min(numbers) < 200_000
        assert max(numbers) > 600_000
        assert numbers == sorted(set(numbers))
